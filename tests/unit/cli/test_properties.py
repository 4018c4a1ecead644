"""The six properties: numbers where a run has them, and `not measured` where it has not."""

from __future__ import annotations

import json
import shlex

import pytest

from moses.report import read_results
from moses.report.properties import NAMES, NOT_MEASURED, command_of, properties


@pytest.fixture
def found(tmp_path, runs):
    def read(**changes):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(runs.results(**changes)))
        return {one.name: one for one in properties(read_results(path))}

    return read


def test_a_run_of_answers(found):
    shown = found()
    assert tuple(shown) == NAMES
    assert shown["knowledge retention"].shown == "0.0 points lost" and shown["knowledge retention"].value == 0.0
    assert shown["forward transfer"].shown == "+5.0 points"
    assert shown["backward transfer"].shown == "+0.0 points"
    assert shown["fixed capacity"].shown == "5.4 kB a task (100.0% of the first)"


def test_what_was_not_measured_says_so(found):
    shown = found()
    for name in ("online learning", "no task boundaries"):
        assert (shown[name].value, shown[name].shown) == (None, NOT_MEASURED)
    nothing = found(til=None, tail=None, capacity=[], base=None, overlap=None)
    assert all((one.value, one.shown) == (None, NOT_MEASURED) for one in nothing.values())
    one_task = found(til={"matrix": [[1.0, None, None]], "metrics": dict.fromkeys(("op", "bwt", "fwt", "forgetting"))})
    assert one_task["knowledge retention"].shown == NOT_MEASURED


def test_perplexity_is_shown_with_its_sign(found):
    matrix = [[10.0, 90.0, 90.0], [11.0, 20.0, 80.0], [10.5, 30.0, 40.0]]
    metrics = {"op": 26.83, "avg": 20.0, "bwt": 5.25, "fwt": -12.5, "forgetting": 5.25}
    shown = found(lower_is_better=True, til={"matrix": matrix, "metrics": metrics}, tail=None)
    assert shown["knowledge retention"].shown == "5.25 perplexity lost, worst task +50.0% since its own stage"
    assert shown["backward transfer"].shown == "+5.25 perplexity (worse)"
    assert shown["forward transfer"].shown == "-12.50 perplexity (better)"


def test_one_pass_is_online_learning(found):
    shown = found(config={"train_config": {"epochs": 1}, "stream": {"digest": "d" * 64}})
    assert shown["online learning"].shown == "61.0 after one pass"
    assert "3 times" in found(config={"train_config": {"epochs": 3}})["online learning"].how


def test_changes_that_were_found(found):
    score = {"boundaries": [9, 20, 30], "found": [4, None, 12], "false_alarms": 1, "returns": [True]}
    one = found(online={"score": score})["no task boundaries"]
    assert one.shown == "2 of 3 changes found, within 12 sequences, 1 false alarms, 1 of 1 returning domains recognised"
    assert one.value == pytest.approx(2 / 3)
    for odd in ({}, {"found": "all"}, {"found": []}):
        assert found(online={"score": odd})["no task boundaries"].shown == NOT_MEASURED


def test_a_budget_is_shown_with_the_most_that_was_used(found):
    one = found(budget={"limit": 10_000, "used": [4_000, 9_500, 9_000]})["fixed capacity"]
    assert one.shown == "9.5 kB of 10.0 kB (95.0%) at most" and one.value == 9_500.0


def test_the_command_is_that_of_the_results(tmp_path, runs):
    (tmp_path / "results.json").write_text(json.dumps(runs.results(command="moses train --model m")))
    assert command_of(read_results(tmp_path)) == "moses train --model m"
    (tmp_path / "results.json").write_text(json.dumps(runs.results()))
    assert "not known" in command_of(read_results(tmp_path))


def test_the_page_and_the_comparison_end_with_them(tmp_path, runs, cli):
    for name, command in (("one", "moses train --seed 1"), ("two", "<i>moses</i>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(runs.results(command=command)))
    cli("report", tmp_path / "one")
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.index("Lifelong-learning properties") > page.index("Settings")
    assert "moses train --seed 1" in page
    code, out, err = cli("compare", tmp_path / "one", tmp_path / "two", "--html", tmp_path / "table.html")
    assert (code, err) == (0, "")
    assert all(name in out for name in NAMES) and "made by" in out
    html = (tmp_path / "table.html").read_text()
    assert "&lt;i&gt;moses&lt;/i&gt;" in html and "<i>" not in html and "fixed capacity" in html
    document = json.loads(cli("compare", tmp_path / "one", "--json")[1])
    assert [one["name"] for one in document[0]["properties"]] == list(NAMES)


def test_a_run_says_the_command_that_makes_it_again(runs):
    from moses.config import MosesConfig, TrainConfig, to_json
    from moses.results import command
    from moses.stream.identify import IdentifierConfig

    config = runs.config(
        method_config=to_json(MosesConfig(rank=4, seed=3, target_modules=("q_proj", "v_proj"))),
        train_config=to_json(TrainConfig(epochs=1, seed=3)),
        identifier_config=to_json(IdentifierConfig()),
    )
    words = shlex.split(command(config))
    assert words[:8] == [
        "moses",
        "train",
        "--model",
        "tiny-model",
        "--stream",
        "streams/demo",
        "--tasks",
        ",".join(runs.tasks),
    ]
    assert words[words.index("--seed") + 1] == "3"
    given = {words[at + 1] for at, word in enumerate(words) if word == "--set"}
    assert given == {"rank=4", 'target_modules=["q_proj", "v_proj"]', "epochs=1", "dtype=float32"}


def test_the_command_of_a_run_without_boundaries_and_with_a_budget(runs):
    from moses.config import MosesConfig, TrainConfig, to_json
    from moses.results import command
    from moses.stream.drift import DriftConfig

    config = runs.config(
        method_config=to_json(MosesConfig()),
        train_config=to_json(TrainConfig(epochs=1)),
        online={"visits": [*runs.tasks, runs.tasks[0]], "horizon": 64, "drift": to_json(DriftConfig())},
        budget=5_000,
    )
    words = shlex.split(command(config))
    assert words[words.index("--tasks") + 1] == ",".join([*runs.tasks, runs.tasks[0]])
    assert words[words.index("--boundaries") + 1] == "none" and words[words.index("--budget") + 1] == "5000"
    assert {words[at + 1] for at, word in enumerate(words) if word == "--set"} == {"horizon=64", "dtype=float32"}
