"""Text domains: real, far apart, whole documents apart between splits; and folders of `{"text"}` rows."""

from __future__ import annotations

import json
import re
import sys
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moses.errors import StreamError
from moses.stream import Stream, load_stream, text_example
from moses.stream import domains as domains_module
from moses.stream.domains import DOMAINS, PASSAGE_BYTES, passages
from moses.stream.library import split_of

TEXTS = [{"text": f"a text, number {number}"} for number in range(4)]


@pytest.fixture(scope="module")
def domains() -> Stream:
    return load_stream("domains")


def write_task(root: Path, name: str, **rows: list[dict[str, str]]) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows.get(split, TEXTS)))
    return folder


def test_six_domains_of_the_promised_size(domains: Stream) -> None:
    assert [task.name for task in domains.tasks] == ["english", "code", "german", "french", "russian", "japanese"]
    for task in domains.tasks:
        assert (len(task.train), len(task.eval), len(task.test)) == (150, 16, 24), task.name
        assert (task.metric, task.domain, task.is_text) == ("perplexity", task.name, True)
        assert all(not example.prompt and example.answer.strip() for example in task.train + task.eval + task.test)


def test_no_paragraph_is_in_two_splits(domains: Stream) -> None:
    for task in domains.tasks:
        splits = [
            {part for example in split for part in re.split(r"\n{2,}", example.answer) if len(part.strip()) >= 40}
            for split in (task.train, task.eval, task.test)
        ]
        for left, right in combinations(splits, 2):
            assert not left & right, task.name


def test_documents_are_whole_in_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {f"page{number}": f"page{number} " * 20 + f"\n\nend of {number} " * 4 for number in range(60)}
    monkeypatch.setitem(domains_module.DOMAINS, "pages", lambda: documents)
    task = domains_module.domain_tasks(["pages"], (1000, 1000, 1000))["pages"]
    for split in ("train", "eval", "test"):
        named = {name for example in getattr(task, split) for name in re.findall(r"page\d+", example.answer)}
        assert named == {name for name in documents if split_of(name) == split}


def test_a_page_is_in_the_same_split_in_every_language() -> None:
    german, french = (DOMAINS[name]() for name in ("german", "french"))
    assert "xz.1" in german and "xz.1" in french  # so that no test page was seen in another language
    assert not any(name.startswith(("xzgrep", "xzdiff", "xzless", "xzmore")) for name in german)


def test_the_languages_are_far_apart(domains: Stream) -> None:
    words = {task.name: set(re.findall(r"\w+", " ".join(row.answer for row in task.test))) for task in domains.tasks}
    for left, right in combinations(words, 2):
        shared = len(words[left] & words[right]) / min(len(words[left]), len(words[right]))
        assert shared < 0.3, (left, right, shared)
    assert {"und", "nicht"} <= words["german"] and {"les", "une"} <= words["french"]


def test_code_has_no_docstrings(domains: Stream) -> None:
    code = "\n".join(example.answer for example in domains.tasks[1].train)
    assert "def " in code and "import " in code
    assert code.count('"""') < 20  # long strings that are no docstrings


def test_fewer_are_spread_over_the_same_texts(domains: Stream) -> None:
    (task,) = load_stream("domains", ["german"], num_train=5, num_test=3).tasks
    assert (len(task.train), len(task.eval), len(task.test)) == (5, 16, 3)
    assert load_stream("domains", ["german"]).tasks[0] == domains.tasks[2]


def test_the_sample_ships_with_its_notices() -> None:
    data = resources.files("moses.stream") / "data"
    notices = (data / "LICENSE.translations").read_text()
    for owner in ("Julianne Frances Haugh", "Joey Hess", "PostgreSQL Global Development Group", "Lasse Collin"):
        assert owner in notices
    assert len((data / "translations.json.gz").read_bytes()) < 400_000


def test_a_python_without_its_documentation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(StreamError, match="install a full Python") as error:
        load_stream("domains", ["english"])
    assert error.value.code == "no_library"


@given(st.text(st.sampled_from("aé日 \n"), max_size=300), st.integers(8, 64))
def test_passages_hold_the_text_and_keep_to_the_limit(text: str, limit: int) -> None:
    pieces = passages(text, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert len(piece.encode()) <= limit or len(piece.splitlines()) == 1
    assert all(piece.strip() for piece in pieces)


def test_a_passage_is_a_page_by_default(domains: Stream) -> None:
    sizes = [len(example.answer.encode()) for task in domains.tasks for example in task.train]
    assert max(sizes) <= 4 * PASSAGE_BYTES  # a single line may be longer
    assert sum(size > PASSAGE_BYTES for size in sizes) <= len(sizes) // 50


def test_a_folder_of_texts_is_a_domain(tmp_path: Path) -> None:
    write_task(tmp_path, "news")
    (task,) = load_stream(tmp_path).tasks
    assert (task.metric, task.domain, task.is_text) == ("perplexity", "news", True)
    assert task.train == tuple(text_example(row["text"]) for row in TEXTS)
    assert task.train[0].shown == "a text, number 0"


def test_text_beside_a_prompt_is_ignored(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "a", "text": "t"}]
    write_task(tmp_path, "qa", train=rows, eval=rows, test=rows)
    (task,) = load_stream(tmp_path).tasks
    assert task.metric == "accuracy" and task.train[0].prompt == "p" and task.domain is None


@pytest.mark.parametrize(
    ("rows", "message", "code"),
    [
        ([*TEXTS, {"txt": "x"}], "train.json:1: the row has no 'text': add it", "bad_row"),
        ([*TEXTS, {"text": 3}], "'text' is a number: it must be a string", "bad_row"),
        ([*TEXTS, {"text": " \n"}], "'text' is empty: fill it or remove the row", "empty_text"),
        ([*TEXTS, "x"], "a row is a string: it must be an object with 'text', as the first", "bad_row"),
        ([*TEXTS, {"text": "\ud800"}], "half of a surrogate pair", "bad_row"),
    ],
)
def test_a_bad_text_row_is_named(tmp_path: Path, rows: list[object], message: str, code: str) -> None:
    write_task(tmp_path, "news", train=rows)  # type: ignore[arg-type]
    with pytest.raises(StreamError) as error:
        load_stream(tmp_path)
    assert message in str(error.value) and error.value.code == code


def test_the_line_of_a_bad_text_row(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "news")
    (folder / "eval.json").write_text('{"text": "one"}\n{"text": "two"}\n{"prompt": "three"}\n')
    with pytest.raises(StreamError, match=r"eval\.json:3: the row has no 'text'"):
        load_stream(tmp_path)


def test_splits_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "news", test=[{"prompt": "p", "answer": "a"}])
    with pytest.raises(StreamError, match=r"test\.json: its rows are prompts and those of train\.json texts") as error:
        load_stream(tmp_path)
    assert error.value.code == "mixed_rows"


@pytest.mark.parametrize(("rows", "metric"), [(TEXTS, "accuracy"), ([{"prompt": "p", "answer": "a"}], "perplexity")])
def test_a_metric_of_the_other_kind_is_refused(tmp_path: Path, rows: list[dict[str, str]], metric: str) -> None:
    write_task(tmp_path, "news", train=rows, eval=rows, test=rows)
    (tmp_path / "stream.json").write_text(json.dumps({"metrics": {"news": metric}}))
    with pytest.raises(StreamError, match="perplexity") as error:
        load_stream(tmp_path)
    assert error.value.code == "metric_mismatch"
