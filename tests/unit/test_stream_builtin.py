"""The built-in streams: real, disjoint, the same every time, and short."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from importlib import resources
from itertools import combinations, pairwise

import pytest

from moses.stream import BUILTIN_STREAMS, Stream, load_stream
from moses.stream import library as library_module
from moses.stream.balance import balanced
from moses.stream.builtin import load_builtin
from moses.stream.task import METRICS, Example


@pytest.fixture(scope="module")
def demo() -> Stream:
    return load_stream("demo")


def test_demo_has_five_tasks_of_the_promised_size(demo: Stream) -> None:
    sizes = [(task.name, task.metric, len(task.train), len(task.eval), len(task.test)) for task in demo.tasks]
    assert sizes == [
        ("topic", "accuracy", 120, 40, 40),
        ("nextline", "edit_similarity", 120, 40, 40),
        ("exception", "accuracy", 120, 40, 40),
        ("docstring", "rouge_l", 120, 40, 40),
        ("action", "accuracy", 120, 40, 40),
    ]


@pytest.mark.parametrize("name", BUILTIN_STREAMS)
def test_no_prompt_is_in_two_splits_or_twice(name: str, demo: Stream) -> None:
    stream = demo if name == "demo" else load_stream(name)
    for task in stream.tasks:
        prompts = [example.shown for split in (task.train, task.eval, task.test) for example in split]
        assert len(prompts) == len(set(prompts)), task.name


def test_no_definition_is_in_two_splits(demo: Stream) -> None:
    for task in (demo.tasks[0], demo.tasks[4]):
        splits = [{example.prompt.splitlines()[2] for example in split} for split in (task.train, task.eval, task.test)]
        assert sum(map(len, splits)) == len(set.union(*splits)) == 200
        words = [{line.split(":")[0] for line in split} for split in splits]
        assert not words[0] & words[2]


def test_no_module_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    source: dict[str, set[str]] = {}
    original = library_module._Candidate

    def remembering(module: str, label: str, example: Example) -> object:
        source.setdefault(example.prompt, set()).add(module)
        return original(module, label, example)

    monkeypatch.setattr(library_module, "_Candidate", remembering)
    tasks = library_module.library_tasks(["nextline", "exception", "docstring"], (200, 40, 50))
    for task in tasks.values():
        assert (len(task.train), len(task.eval), len(task.test)) == (200, 40, 50)
        modules = [
            Counter(min(source[example.prompt]) for example in split if len(source[example.prompt]) == 1)
            for split in (task.train, task.eval, task.test)
        ]
        for left, right in combinations(modules, 2):
            assert not left.keys() & right.keys()
        for split in modules:
            assert max(split.values()) <= 12  # no long module rules a split


def test_labels_are_spread_evenly(demo: Stream) -> None:
    for task in (demo.tasks[0], demo.tasks[4]):
        for split in (task.train, task.eval, task.test):
            counts = Counter(example.answer for example in split)
            assert max(counts.values()) - min(counts.values()) <= 1, (task.name, counts)
    exceptions = Counter(example.answer for example in demo.tasks[2].test)
    assert max(exceptions.values()) <= 20  # the most frequent answer is right one time in three at most


def test_the_answer_of_a_choice_stands_in_its_options(demo: Stream) -> None:
    for task in (demo.tasks[0], demo.tasks[2], demo.tasks[4], *load_stream("tiny").tasks):
        for example in task.train + task.eval + task.test:
            options = example.prompt.splitlines()[1]
            assert options.startswith("Options: ")
            assert example.answer in options.removeprefix("Options: ").split(", ")


def test_order_of_examples_owes_nothing_to_labels(demo: Stream) -> None:
    answers = [example.answer for example in demo.tasks[0].train]
    repeats = sum(left == right for left, right in pairwise(answers))
    assert (
        10 <= repeats <= 60
    )  # 30 is expected of a random order of 8 labels; sorted ones repeat 232 times, rotating ones never


def test_prompts_are_short_and_answers_hidden(demo: Stream) -> None:
    for task in demo.tasks:
        for example in task.train + task.eval + task.test:
            assert len(example.prompt) <= 420, example
            assert len(example.answer) <= 120, example
            assert example.prompt.splitlines()[-1].endswith(":")
    for example in demo.tasks[2].train:
        assert f"raise {example.answer}" not in example.prompt
        assert example.prompt.count("raise ___") == 1
    for example in demo.tasks[3].train:
        assert example.answer not in example.prompt


def test_the_same_in_every_process(demo: Stream) -> None:
    code = "import hashlib, moses.stream as s;print(hashlib.sha256(repr(s.load_stream('demo')).encode()).hexdigest())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"} | _path()
    )
    assert result.stdout.strip() == hashlib.sha256(repr(demo).encode()).hexdigest()


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}


def test_less_training_leaves_the_test_as_it_is(demo: Stream) -> None:
    fewer = load_builtin("demo", ["topic", "action"], (24, None, None))
    assert [task.test for task in fewer.tasks] == [demo.tasks[0].test, demo.tasks[4].test]
    assert len(fewer.tasks[0].train) == 24


def test_more_than_there_is_gives_what_there_is() -> None:
    task = load_stream("demo", ["topic"], num_train=100_000, num_eval=100_000, num_test=100_000).tasks[0]
    assert (len(task.train), len(task.eval), len(task.test)) == (480, 80, 160)


def test_tiny_is_tiny() -> None:
    stream = load_stream("tiny")
    assert [task.name for task in stream.tasks] == ["living", "things", "action"]
    assert {(len(task.train), len(task.eval), len(task.test)) for task in stream.tasks} == {(16, 4, 8)}
    assert all(len({example.answer for example in task.train}) == 4 for task in stream.tasks)


def test_tasks_choose_and_order() -> None:
    assert [task.name for task in load_stream("tiny", ["action", "living"]).tasks] == ["action", "living"]


def test_metrics_are_known(demo: Stream) -> None:
    assert {task.metric for task in demo.tasks + load_stream("tiny").tasks} <= set(METRICS)


def test_the_sample_ships_with_its_licence() -> None:
    data = resources.files("moses.stream") / "data"
    licence = (data / "LICENSE.wordnet").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    sample = json.loads((data / "wordnet.json").read_text())
    glosses = [gloss for part in sample.values() for label in part.values() for _, gloss in label]
    assert len(glosses) == len(set(glosses)) == (8 + 6) * 90


def test_balanced_takes_turns_and_stops_at_the_size() -> None:
    by_label = {
        label: [Example(f"{label}{number}", label) for number in range(size)] for label, size in (("a", 5), ("b", 2))
    }
    assert Counter(example.answer for example in balanced(by_label, 6)) == {"a": 4, "b": 2}
    assert {example.prompt for example in balanced(by_label, 3)} == {"a0", "b0", "a1"}
    assert balanced({}, 3) == ()
