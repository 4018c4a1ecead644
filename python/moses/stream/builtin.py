"""The streams that need no download: `demo`, five real tasks, `tiny`, three small ones for tests, `domains`, texts to model.

Definitions come from a sample of WordNet 3.0 that ships with moses (data/LICENSE.wordnet), code from Python's own
library. Guarantees: no definition and no module is in two splits; the test examples do not depend on how many are taken
to train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from moses.stream.balance import balanced
from moses.stream.domains import DOMAINS, domain_tasks
from moses.stream.folder import choose_tasks
from moses.stream.library import library_tasks
from moses.stream.task import Example, Stream, Task


@dataclass(frozen=True, slots=True)
class _Definitions:
    """A task that asks for the class of a WordNet definition."""

    part: str  # of wordnet.json
    labels: tuple[str, ...]
    question: str
    with_word: bool


@dataclass(frozen=True, slots=True)
class BuiltinStream:
    """`tasks`: name -> how to cut it, None for one that `make` knows; `sizes`: train, eval and test examples a task by
    default."""

    tasks: Mapping[str, _Definitions | None]
    sizes: tuple[int, int, int]
    make: Callable[[Sequence[str], tuple[int, int, int]], dict[str, Task]] = library_tasks


_WHAT, _ACTION = "What is defined here?", "What kind of action is this verb?"
_TOPICS = ("animal", "artifact", "body", "food", "person", "place", "plant", "substance")
_ACTIONS = ("change", "communication", "contact", "emotion", "motion", "thinking")

BUILTIN_STREAMS: dict[str, BuiltinStream] = {
    "demo": BuiltinStream(
        {
            "topic": _Definitions("nouns", _TOPICS, _WHAT, with_word=False),
            "nextline": None,
            "exception": None,
            "docstring": None,
            "action": _Definitions("verbs", _ACTIONS, _ACTION, with_word=True),
        },
        (120, 40, 40),
    ),
    "tiny": BuiltinStream(
        {
            "living": _Definitions("nouns", ("animal", "body", "person", "plant"), _WHAT, with_word=False),
            "things": _Definitions("nouns", ("artifact", "food", "place", "substance"), _WHAT, with_word=False),
            "action": _Definitions(
                "verbs", ("communication", "contact", "motion", "thinking"), _ACTION, with_word=True
            ),
        },
        (16, 4, 8),
    ),
    "domains": BuiltinStream(dict.fromkeys(DOMAINS), (150, 16, 24), domain_tasks),
}

# of the definitions of a label in wordnet.json: the first for the test, the next for evaluation, all others to train
_TEST_PER_LABEL, _EVAL_PER_LABEL = 20, 10


def load_builtin(
    name: str, tasks: Sequence[str] | None = None, limits: Sequence[int | None] = (None, None, None)
) -> Stream:
    """One of BUILTIN_STREAMS; `limits` replaces its sizes of train, eval and test (fewer examples where there are no
    more)."""
    stream = BUILTIN_STREAMS[name]
    names = list(stream.tasks) if tasks is None else choose_tasks(tasks, list(stream.tasks))
    train, evaluation, test = (
        size if limit is None else limit for size, limit in zip(stream.sizes, limits, strict=True)
    )
    sizes = (train, evaluation, test)
    others = [task for task in names if stream.tasks[task] is None]
    library = stream.make(others, sizes) if others else {}
    made = []
    for task in names:
        definitions = stream.tasks[task]
        made.append(library[task] if definitions is None else _definitions_task(task, definitions, sizes))
    return Stream(name, tuple(made))


def _definitions_task(name: str, task: _Definitions, sizes: tuple[int, int, int]) -> Task:
    splits: tuple[dict[str, list[Example]], ...] = ({}, {}, {})
    for label in task.labels:
        examples = []
        for word, gloss in _wordnet()[task.part][label]:
            text = f"{word}: {gloss}" if task.with_word else gloss
            prompt = f"{task.question}\nOptions: {', '.join(task.labels)}\n{text}\nAnswer:"
            examples.append(Example(prompt, label))
        last_eval = _TEST_PER_LABEL + _EVAL_PER_LABEL
        parts = (examples[last_eval:], examples[_TEST_PER_LABEL:last_eval], examples[:_TEST_PER_LABEL])
        for split, part in zip(splits, parts, strict=True):
            split[label] = part
    train, evaluation, test = (balanced(split, size) for split, size in zip(splits, sizes, strict=True))
    return Task(name, train, evaluation, test, "accuracy")


@cache
def _wordnet() -> dict[str, dict[str, list[Any]]]:
    sample: dict[str, dict[str, list[Any]]] = json.loads(
        resources.files("moses.stream").joinpath("data/wordnet.json").read_text("utf-8")
    )
    return sample
