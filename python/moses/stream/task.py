"""What a stream is made of: examples, tasks, and the stream itself. Immutable, and without torch."""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_METRICS = ("accuracy", "exact_match", "rouge_l", "edit_similarity", "sari")
"""The metrics of answers, 0 to 100; `moses.metrics` computes them."""

TEXT_METRIC = "perplexity"
"""The metric of tasks whose examples are texts to model, not prompts to answer."""

METRICS = (*ANSWER_METRICS, TEXT_METRIC)
"""The names that `Task.metric` may take."""

LOWER_IS_BETTER = frozenset({TEXT_METRIC})
"""The metrics whose scores fall when a model learns."""

DEFAULT_METRIC = "accuracy"


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer that is right for it; neither is empty. A text to model is an answer without a prompt."""

    prompt: str
    answer: str

    @property
    def shown(self) -> str:
        """What tells of the example's task: the prompt, or the text."""
        return self.prompt or self.answer


def text_example(text: str) -> Example:
    """A text to model."""
    return Example("", text)


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of a stream: what to learn from, what to choose by, what to be judged by."""

    name: str
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    test: tuple[Example, ...]
    metric: str = DEFAULT_METRIC
    domain: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether its examples are texts to model, without prompts."""
        return self.metric == TEXT_METRIC


@dataclass(frozen=True, slots=True)
class Stream:
    """Tasks in the order in which they are learned; their names are unique."""

    name: str
    tasks: tuple[Task, ...]
