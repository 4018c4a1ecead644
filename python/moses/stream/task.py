"""What a stream is made of: examples, tasks, and the stream itself. Immutable, and without torch."""

from __future__ import annotations

from dataclasses import dataclass

METRICS = ("accuracy", "exact_match", "rouge_l", "edit_similarity", "sari")
"""The names that `Task.metric` may take; `moses.metrics` computes them."""

DEFAULT_METRIC = "accuracy"


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer that is right for it; neither is empty."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of a stream: what to learn from, what to choose by, what to be judged by."""

    name: str
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    test: tuple[Example, ...]
    metric: str = DEFAULT_METRIC
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Tasks in the order in which they are learned; their names are unique."""

    name: str
    tasks: tuple[Task, ...]
