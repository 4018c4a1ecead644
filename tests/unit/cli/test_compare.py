"""Runs side by side, and only runs of one stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moses.errors import RunError
from moses.report import compare_runs


@pytest.fixture
def two(tmp_path, runs):
    def write(name: str, **changes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(runs.results(**changes)))
        return tmp_path / name

    return write


def test_rows_hold_what_the_results_hold(two):
    rows = compare_runs([two("one"), two("two", method="sequential", tail=None, capacity=[])])
    assert [row.method for row in rows] == ["moses", "sequential"]
    first, second = (row.as_dict() for row in rows)
    assert first | {"run": ""} == {
        "run": "",
        "method": "moses",
        "seed": 7,
        "op": 61.0,
        "bwt": 0.0,
        "fwt": 5.0,
        "tail_op": 58.0,
        "task_accuracy": 97.5,
        "bytes_added": 3 * 5390,
        "bank_fraction": pytest.approx(0.3),
        "lower_is_better": False,
        "properties": first["properties"],
        "command": "not known: the results are of an earlier moses",
    }
    assert len(first["properties"]) == 6
    assert (second["tail_op"], second["task_accuracy"], second["bytes_added"], second["bank_fraction"]) == (None,) * 4


def test_the_table_the_json_and_the_page(two, cli, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two("one")
    two("two", method="<b>sequential</b>", til={"matrix": [], "metrics": {"op": 50.0, "bwt": -10.04}})
    code, out, err = cli("compare", "one", "two", "--html", "table.html")
    assert (code, err) == (0, "")
    golden("cli_compare.txt", "\n".join(line.rstrip() for line in out.splitlines()) + "\n")
    page = (tmp_path / "table.html").read_text()
    assert "&lt;b&gt;sequential&lt;/b&gt;" in page and "-10.0" in page
    assert [row["op"] for row in json.loads(cli("compare", "one", "two", "--json")[1])] == [61.0, 50.0]


@pytest.mark.parametrize(
    ("tasks", "what"),
    [
        (("emotion", "topic"), "it has 2 tasks where"),
        (("emotion", "trec", "topic"), "its task 2 is 'trec' where"),
        (("emotion", "topic", "trec", "more"), "it has 4 tasks where"),
    ],
)
def test_other_tasks_are_refused(two, runs, cli, tasks, what):
    one, other = two("one"), two("two", **runs.results(tasks))
    with pytest.raises(RunError, match=what) as caught:
        compare_runs([one, other])
    assert caught.value.code == "streams_differ"
    assert str(other) in str(caught.value)
    assert cli("compare", one, other)[0] == 2


def test_the_same_names_of_other_examples_are_refused(two):
    one, other = two("one"), two("two", config={"stream": {"digest": "e" * 64}})
    with pytest.raises(RunError, match="other examples"):
        compare_runs([one, other])
