"""Evaluates every cell R[t][i] on its own, with the task given (TIL) and with the task inferred from each prompt or text (TaIL).

No cell is copied from another, not even where freezing makes two of them equal: that they are is what the matrix shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor

from .answers import Answerer, TaskFormat
from .attached import assigned
from .methods import Method
from .metrics import score
from .perplexity import TextLoss, TextScorer, perplexity
from .stream.identify import TaskIdentifier
from .stream.task import Example, Stream, Task

Cell = float | None


@dataclass(frozen=True)
class Evaluator:
    """Scores of one model on the test sets of a stream.

    Attributes:
        method: the method with its model.
        answerer: turns prompts into answers.
        stream: the tasks, in order.
        formats: how each task's answers are read off, by the task's name.
        identifier: infers tasks; None where TaIL is not asked for.
        features: (batch of prompts) to the identifier's features, of the base model.
    """

    method: Method
    answerer: Answerer
    stream: Stream
    formats: dict[str, TaskFormat]
    identifier: TaskIdentifier | None
    features: Callable[[Sequence[str]], Tensor] | None

    def til_row(self, trained: Sequence[str], columns: Sequence[int], tick: Callable[[str, int], None]) -> list[Cell]:
        """Scores with the task given, in the stream's order.

        A task not trained yet is answered with the latest trained task's parameters (before any, by the base model), and is
        null where every task has a head of its own. Columns that are not asked for are null.
        """
        row: list[Cell] = [None] * len(self.stream.tasks)
        for column in columns:
            task = self.stream.tasks[column]
            if task.name not in trained and self.answerer.kind == "classifier":
                continue
            name = task.name if task.name in trained else (trained[-1] if trained else None)
            questions = prompts(self._test(task))
            if task.is_text:
                row[column] = perplexity(self._losses(name, task.name, questions, tick))
            else:
                row[column] = self._score(task, self._answers(name, task.name, questions, tick))
        return row

    def tail_row(
        self, trained: Sequence[str], columns: Sequence[int], tick: Callable[[str, int], None]
    ) -> tuple[list[Cell], list[list[int]]]:
        """Scores with the task inferred from each prompt, and how often each task was taken for which.

        Returns:
            The row, and counts (tasks, tasks + 1): true task by inferred task, the last column being `unknown`.
        """
        assert self.identifier is not None and self.features is not None
        row: list[Cell] = [None] * len(self.stream.tasks)
        confusion = [[0] * (len(self.stream.tasks) + 1) for _ in self.stream.tasks]
        position = {
            self.method.registry.task(name).id: [task.name for task in self.stream.tasks].index(name)
            for name in trained
        }
        for column in columns:
            task = self.stream.tasks[column]
            if task.name not in trained and self.answerer.kind == "classifier":
                continue
            questions = prompts(self._test(task))
            inferred = self.infer(questions)
            for found in inferred:
                confusion[column][position.get(found, len(self.stream.tasks))] += 1
            if task.is_text:
                row[column] = perplexity(self._losses_inferred(questions, inferred, task.name, tick))
            else:
                row[column] = self._score(task, self.answer_inferred(questions, inferred, task.name, tick))
        return row, confusion

    def infer(self, questions: Sequence[str]) -> list[int]:
        """The id of the task that each prompt is taken for; -1 is unknown."""
        assert self.identifier is not None and self.features is not None
        return assigned(self.identifier.predict(self.features(questions))).tolist()

    def answer_inferred(
        self, questions: Sequence[str], inferred: Sequence[int], fallback: str, tick: Callable[[str, int], None]
    ) -> list[str]:
        """Each prompt's answer by the parameters of the task it was taken for; the base model answers the unknown ones."""
        answers = [""] * len(questions)
        names = {info.id: info.name for info in self.method.registry.tasks()}
        for found in sorted(set(inferred)):
            rows = [index for index, task in enumerate(inferred) if task == found]
            name = names.get(found)
            if name is None and self.answerer.kind == "classifier":
                tick(fallback, len(rows))
                continue  # the base model has no head, so an unknown prompt has no answer
            for index, text in zip(
                rows, self._answers(name, name or fallback, [questions[row] for row in rows], tick), strict=True
            ):
                answers[index] = text
        return answers

    def base_row(self, columns: Sequence[int], tick: Callable[[str, int], None]) -> list[Cell]:
        """R[0]: the base model's scores; null for a model with heads, which has none before its tasks."""
        return self.til_row([], columns, tick)

    def _answers(
        self, name: str | None, form: str, questions: Sequence[str], tick: Callable[[str, int], None]
    ) -> list[str]:
        with self.method.answer(name):
            return self.answerer.answer(
                self.method.model, questions, self.formats[form], tick=lambda done: tick(form, done)
            )

    def _losses(
        self, name: str | None, form: str, texts: Sequence[str], tick: Callable[[str, int], None]
    ) -> list[TextLoss]:
        scorer = TextScorer(self.answerer.tokenizer, self.answerer.config)
        with self.method.answer(name):
            return scorer.losses(self.method.model, texts, tick=lambda done: tick(form, done))

    def _losses_inferred(
        self, texts: Sequence[str], inferred: Sequence[int], form: str, tick: Callable[[str, int], None]
    ) -> list[TextLoss]:
        """Each text's loss by the parameters of the task it was taken for, grouped by task; the base model's for the unknown."""
        names = {info.id: info.name for info in self.method.registry.tasks()}
        losses = []
        for found in sorted(set(inferred)):
            group = [text for text, task in zip(texts, inferred, strict=True) if task == found]
            losses += self._losses(names.get(found), form, group, tick)
        return losses

    def _score(self, task: Task, answers: list[str]) -> float:
        examples = self._test(task)
        return score(task.metric, answers, [example.answer for example in examples], prompts(examples))

    def _test(self, task: Task) -> Sequence[Example]:
        return task.test[: self.answerer.config.eval_limit]


def prompts(examples: Sequence[Example]) -> list[str]:
    """The prompts alone; of texts to model, the texts."""
    return [example.shown for example in examples]


def evaluate_run(
    path: str | PathLike[str], mode: str = "both", model: Any = None, stream: Any = None
) -> dict[str, Any]:
    """Evaluate the final row of a run again, from its folder alone.

    Args:
        path: the run.
        mode: `til`, `tail` or `both`.
        model: the base model, where it is not where the run says.
        stream: the stream, where it is not where the run says.

    Returns:
        {"til": {"row", "mean"}, "tail": {"row", "mean", "task_accuracy", "confusion"}, "tasks", "method"}.
    """
    from .session import open_session

    with open_session(path, model=model, stream=stream) as session:
        return session.final_scores(("til", "tail") if mode == "both" else (mode,))
