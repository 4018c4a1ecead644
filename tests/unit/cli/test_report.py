"""The report: self-contained, the same from the same results, and true to them whatever tasks are called."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moses.errors import FormatError, MosesError, RunError
from moses.report import PICTURES, draw_pictures, read_results, write_report
from moses.report.page import build_page
from moses.report.results import MAX_RESULTS_BYTES, MAX_TASKS

HOSTILE = (
    "<script>alert(1)</script>",
    "a\" onload='x' &amp; b",
    "$\\frac{1}{0$ \x1b[31m\nnew line\u202e",
    "$\\frac{$",
    "漢字 and ünïcode " + "long " * 50,
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: tags in balance, attributes, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write(folder: Path, document: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory, whole_run) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert write_report(whole_run, out) == out / "report.html"
    return out


def test_every_picture_is_a_file_and_in_the_page(reported):
    page = (reported / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(reported / name).read_bytes() for name in PICTURES]
    assert all(data.startswith(b"\x89PNG\r\n") for data in embedded)
    assert sorted(path.name for path in reported.iterdir()) == sorted([*PICTURES, "report.html"])


def test_the_page_is_whole_and_needs_nothing_else(reported):
    page = Page((reported / "report.html").read_text())
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:image/png;base64,")
    text = (reported / "report.html").read_text()
    assert "http://" not in text and "https://" not in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text


def test_the_same_results_give_the_same_bytes(reported, whole_run, tmp_path):
    again = tmp_path / "other name"
    write_report(whole_run, again)
    for path in reported.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_numbers_are_in_the_tables(reported):
    cells = Page((reported / "report.html").read_text()).texts
    for number in ("62.0", "10.0", "97.5%", "5390", "84", "39", "75.0%", "12.5 s", "30.0%"):
        assert number in cells, number


def test_hostile_names_stay_names(tmp_path, runs):
    folder = write(tmp_path / "<b>run", runs.results(HOSTILE))
    page = Page(write_report(folder, tmp_path / "out").read_text())
    assert page.open == [] and "script" not in page.tags and "b" in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    texts = "".join(page.texts)
    assert HOSTILE[0] in texts and HOSTILE[1] in texts
    assert "\x1b" not in texts and "\u202e" not in texts


def minimal(runs, **changes):
    document = runs.results(("only",))
    for key in ("tail", "capacity", "overlap", "similar", "expert_use", "seconds", "environment", "task_metrics"):
        document.pop(key)
    return document | changes


@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({}, {"til-matrix.png", "scores.png"}),
        ({"base": None, "til": None}, set()),
        ({"base": [None]}, {"til-matrix.png", "scores.png"}),
        ({"til": {"matrix": [], "metrics": {}}}, {"til-matrix.png"}),
        (
            {"til": {"matrix": [[None]], "metrics": {"op": None}}, "overlap": [[0]], "expert_use": {"only": {}}},
            {"til-matrix.png", "scores.png"},
        ),
        (
            {"capacity": [{"task": "only", "bytes": {}, "bank_fraction": None}]},
            {"til-matrix.png", "scores.png", "bytes.png"},
        ),
        (
            {"overlap": [[5]], "expert_use": {"only": {"x": [1.0]}}},
            {"til-matrix.png", "scores.png", "overlap.png", "experts.png"},
        ),
    ],
)
def test_what_is_missing_is_said_and_not_drawn(tmp_path, runs, changes, pictures):
    folder = write(tmp_path / "run", minimal(runs, **changes))
    (folder / "confusion.png").write_bytes(b"of an earlier report")
    write_report(folder)
    assert {path.name for path in folder.glob("*.png")} == pictures
    assert Page((folder / "report.html").read_text()).open == []


def test_a_run_that_goes_on_can_be_reported(tmp_path, runs):
    document = runs.results()
    for mode in ("til", "tail"):
        document[mode]["matrix"] = document[mode]["matrix"][:1]
    page = write_report(write(tmp_path / "run", document)).read_text()
    assert "1 of 3 tasks trained so far" in page


def test_many_tasks_are_drawn_without_numbers(tmp_path, runs):
    results = read_results(write(tmp_path / "run", runs.results(tuple(f"task-{n}" for n in range(30)))))
    pictures = draw_pictures(results)
    assert set(pictures) == set(PICTURES)
    for name, data in pictures.items():
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert max(width, height) < 9000, name
    assert Page(build_page(results, "many", pictures)).open == []


def test_a_cell_without_a_score_is_not_coloured(tmp_path, runs):
    from matplotlib import colormaps
    from matplotlib.image import imread

    zero = [round(255 * part) for part in colormaps["YlGnBu"](0.0)[:3]]
    shares = []
    for score in (None, 0.0):
        results = read_results(write(tmp_path / "run", minimal(runs, base=[score])))
        picture = imread(io.BytesIO(draw_pictures(results)["til-matrix.png"]))
        shares.append(float(((255 * picture[..., :3]).round() == zero).all(-1).mean()))
    assert shares[0] == 0.0
    assert shares[1] > 0.05


# -- results.json is not trusted ---------------------------------------------------------------------------------------


def put(path: str, value: object):
    """A change of the document: `til.matrix.0` is set to the value."""

    def change(document):
        *above, last = path.split(".")
        for key in above:
            document = document[int(key)] if isinstance(document, list) else document[key]
        if isinstance(document, list):
            document[int(last)] = value
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("method", 3, "results.method"),
        ("tasks", [], "results.tasks"),
        ("tasks", ["a", "a", "b"], "results.tasks"),
        ("tasks", ["a", 1, "b"], "results.tasks[1]"),
        ("tasks", [str(n) for n in range(MAX_TASKS + 1)], "results.tasks"),
        ("base", [1.0], "results.base"),
        ("base.1", "x", "results.base[1]"),
        ("base.1", True, "results.base[1]"),
        ("base.1", 1e999, "results.base[1]"),
        ("til", [], "results.til"),
        ("til.matrix", None, "results.til.matrix"),
        ("til.matrix", [[1.0] * 3] * 4, "results.til.matrix"),
        ("til.matrix.1", [1.0, 2.0], "results.til.matrix[1]"),
        ("til.metrics.op", "x", "results.til.metrics.op"),
        ("tail.confusion", [[0, 0, 0]] * 3, "results.tail.confusion[0]"),
        ("tail.confusion.0.0", -1, "results.tail.confusion[0][0]"),
        ("capacity.0.bytes.weights", 0.5, "results.capacity[0].bytes.weights"),
        ("capacity.0.bank_fraction", 2.0, "results.capacity[0].bank_fraction"),
        ("overlap", [[1], [2]], "results.overlap"),
        ("expert_use.emotion.layers.0", 1, None),
    ],
)
def test_a_damaged_field_is_named(tmp_path, runs, path, value, field):
    document = runs.results()
    if field is None:
        path, field = "expert_use.emotion", "results.expert_use.emotion"
        value = [1]
    put(path, value)(document)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(document).replace("Infinity", "1e999"))
    with pytest.raises(FormatError) as caught:
        read_results(folder)
    assert f"{folder / 'results.json'}: {field} " in str(caught.value)
    assert caught.value.code == "results_damaged"


@pytest.mark.parametrize("content", ["", "[", "[" * 200_000, "NaN", '{"tasks": NaN}', "[]", "\ud800", "1" * 10_000])
def test_what_is_no_document_is_a_typed_error(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(MosesError, match=r"results\.json"):
        read_results(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "results.json").open("wb") as file:
        file.truncate(MAX_RESULTS_BYTES + 1)
    with pytest.raises(FormatError, match="larger"):
        read_results(tmp_path)


def test_a_run_without_results_says_how_to_get_them(tmp_path):
    with pytest.raises(RunError, match="--resume"):
        read_results(tmp_path)
    with pytest.raises(RunError, match="check the path"):
        read_results(tmp_path / "absent")


def test_the_command_says_where_the_page_is(cli, run, tmp_path):
    code, out, err = cli("report", run, "--out", tmp_path / "deep" / "folder")
    assert (code, out.splitlines()[-1], err) == (0, str(tmp_path / "deep" / "folder" / "report.html"), "")
    assert "knowledge retention" in out and "not measured" in out
    assert (tmp_path / "deep" / "folder" / "scores.png").stat().st_mode & 0o777 == 0o644
