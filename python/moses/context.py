"""Which task each row of the batch is answered for: the one thing that all banks, routers and heads of a model share.

A `TaskContext` holds no tensor of the model and knows no weights; switching the task is one assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share a task.

    Attributes:
        task: the task's id.
        rows: (rows,) int64 on the CPU; None where the group is the whole batch.
    """

    task: int
    rows: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """The group's rows of `x` (batch, ...)."""
        return x if self.rows is None else x.index_select(0, self.rows.to(x.device))


@dataclass
class TaskContext:
    """The groups that the next forward answers, and the route counts that an evaluation may ask for.

    Attributes:
        groups: empty for the base model; rows in no group get the base model.
        infer: whether the task is to be inferred from each prompt before its forward (TaIL).
        open_task: id of the task in training, if any.
        counts: when a dict, routers add tokens per expert under (task, router's name); None does not count.
    """

    groups: tuple[Group, ...] = ()
    infer: bool = False
    open_task: int | None = None
    counts: dict[tuple[int, str], Tensor] | None = field(default=None)

    @contextmanager
    def use(self, groups: tuple[Group, ...], infer: bool = False) -> Iterator[None]:
        """Answer for `groups` inside the with block, and as before after it."""
        before = self.groups, self.infer
        self.groups, self.infer = groups, infer
        try:
            yield
        finally:
            self.groups, self.infer = before


def groups_by_task(task_ids: Tensor, unknown: int = -1) -> tuple[Group, ...]:
    """One group a distinct task of `task_ids` (rows,) int64; rows of `unknown` are in none (the base model answers them)."""
    tasks = [int(task) for task in torch.unique(task_ids) if int(task) != unknown]
    if len(tasks) == 1 and bool((task_ids == tasks[0]).all()):
        return (Group(tasks[0]),)
    return tuple(Group(task, torch.nonzero(task_ids == task).flatten().cpu()) for task in tasks)
