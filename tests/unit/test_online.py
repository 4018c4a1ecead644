"""A stream without task boundaries: one pass opens a task a domain, and knows the one that comes back."""

from __future__ import annotations

import json
import random

import pytest
from safetensors.torch import load as read_safetensors

from moses import _core, training
from moses.checkpoint import load
from moses.cli import main
from moses.errors import ConfigError, StreamError
from moses.evaluate import evaluate_run
from moses.online.sequences import concatenated
from moses.progress import Progress
from moses.session import Session
from moses.stream import load_stream
from moses.stream.task import Example, Stream, Task

SETTINGS = {
    "batch_size": 4,
    "learning_rate": 0.02,
    "max_length": 64,
    "eval_limit": 3,
    "max_new_tokens": 4,
    "identifier.num_features": 48,
    "drift.num_features": 48,
    "drift.reference": 16,
    "drift.opening": 8,
    "horizon": 32,
}
VISITS = ("animals", "verbs", "animals")


def words_of(name):
    task = load_stream("tiny", [name]).tasks[0]
    return sorted({word for row in task.train for word in row.prompt.split("\n")[2].split() if word.isalpha()})


@pytest.fixture(scope="module")
def stream():
    """Sentences of the words of two tasks, without the words that both have: 64 of `animals`, 32 of `verbs`."""
    random.seed(0)
    first, second = words_of("living"), words_of("action")
    tasks = []
    for name, words, count in (
        ("animals", sorted(set(first) - set(second))[:24], 64),
        ("verbs", sorted(set(second) - set(first))[:24], 32),
    ):
        rows = tuple(Example(" ".join(random.choices(words, k=20)), random.choice(words)) for _ in range(count + 6))
        tasks.append(Task(name, rows[:count], (), rows[count:], "accuracy"))
    return Stream("two", tuple(tasks))


def run(folder, stream, out, method="moses", **more):
    settings = SETTINGS | more.pop("settings", {})
    return training.train(
        str(folder),
        stream=stream,
        tasks=more.pop("tasks", VISITS),
        method=method,
        output_dir=out,
        settings=settings,
        progress=Progress(quiet=True),
        boundaries="none",
        **more,
    )


def measured(out):
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("environment", "seconds")}


@pytest.fixture(scope="module")
def finished(tiny_folder, stream, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    return out, run(tiny_folder, stream, out).results


def test_changes_are_found_and_a_domain_that_returns_is_its_old_task(finished):
    _, results = finished
    score = results["online"]["score"]
    assert score["boundaries"] == (32, 64) and score["false_alarms"] == 0
    assert all(0 < delay <= 16 for delay in score["found"])
    assert score["returns"] == (True,) and score["new"] == (True, True)
    segments = results["online"]["segments"]
    assert [part["task"] for part in segments] == ["segment-1", "segment-2", "segment-1"]
    assert [part["returned"] for part in segments] == [False, False, True]
    assert results["online"]["domains"] == {"animals": "segment-1", "verbs": "segment-2"}


def test_the_last_row_is_evaluated_with_and_without_the_domain(finished):
    out, results = finished
    assert [len(row) for row in results["til"]["matrix"]] == [2]
    assert results["tail"]["metrics"]["op"] is not None and results["tail"]["task_accuracy"] >= 50
    assert sum(map(sum, results["tail"]["confusion"])) == 6
    assert json.loads((out / "results.json").read_text())["online"]["finished"] is True
    assert [info.name for info in load(out).registry.tasks()] == ["segment-1", "segment-2"]


def test_an_interrupted_run_ends_in_the_same_results(finished, tiny_folder, stream, tmp_path, monkeypatch):
    reference, _ = finished
    commit = Session.commit_task

    def stop_after_the_first(session, name, *rest):
        commit(session, name, *rest)
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(Session, "commit_task", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, stream, out)
    monkeypatch.setattr(Session, "commit_task", commit)
    run(tiny_folder, stream, out, resume=True)
    assert measured(out) == measured(reference)
    run(tiny_folder, stream, out, resume=True)  # finished: nothing to do


@pytest.mark.parametrize("method", ["per-task", "lifelong-moe", "pangu-sigma"])
def test_other_methods_learn_it_too(tiny_folder, stream, tmp_path, method):
    results = run(tiny_folder, stream, tmp_path / "run", method).results
    assert [part["task"] for part in results["online"]["segments"]] == ["segment-1", "segment-2", "segment-1"]
    with _core.Store.open(tmp_path / "run") as store:
        for name in [name for name in store.files() if name.startswith("tasks/")]:
            tensors = read_safetensors(store.read(name))
            learned = [tensor for key, tensor in tensors.items() if "lora_B" in key or key == "weights"]
            assert any(tensor.any() for tensor in learned), "nothing was trained"


def test_its_run_is_shown_and_evaluated_as_any_other(finished, stream, capsys):
    out, results = finished
    for command in ("report", "compare", "inspect", "verify"):
        code = main([command, str(out)])
        assert code == 0, (command, capsys.readouterr().err)
    again = evaluate_run(out, "both", stream=stream)
    assert again["til"]["row"] == results["til"]["matrix"][-1]
    assert again["tail"]["confusion"] == results["tail"]["confusion"]


def test_visits_read_each_example_once(stream):
    examples, visits = concatenated(stream, VISITS)
    assert visits == [("animals", 32), ("verbs", 32), ("animals", 32)]
    assert len(set(examples)) == len(examples) == 96
    assert tuple(examples[:32] + examples[64:]) == stream.tasks[0].train
    with pytest.raises(StreamError, match="'plants' is no domain of stream 'two'; it has animals, verbs"):
        concatenated(stream, ["plants"])
    with pytest.raises(StreamError, match="visited 33 times and has 32 examples"):
        concatenated(stream, ["verbs"] * 33)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"settings": {"epochs": 2}}, "one_pass"),
        ({"settings": {"drift.test": "guess"}}, "bad_setting"),
        ({"settings": {"drift.colour": 1}}, "unknown_setting"),
        ({"settings": {"gradient_accumulation": 2}}, "bad_setting"),
        ({"tasks": ("animals", "plants")}, "unknown_task"),
    ],
)
def test_bad_input_writes_nothing(tiny_folder, stream, tmp_path, more, code):
    with pytest.raises((ConfigError, StreamError)) as error:
        run(tiny_folder, stream, tmp_path / "run", **more)
    assert error.value.code == code
    assert not (tmp_path / "run").exists()
