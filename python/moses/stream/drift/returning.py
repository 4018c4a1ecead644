"""Which earlier task a segment belongs to, by its first sequences together: a vote of the task identifier.

One sequence may be unlike its task's others; the median of several is a far sharper judge of whether they are of that task,
so it has a bound of its own, below the identifier's for one prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moses.stream.identify import TaskIdentifier

from .config import DriftConfig


def recognise(identifier: TaskIdentifier, features: NDArray[Any], config: DriftConfig) -> int | None:
    """The task that more than `share` of the sequences (B, 2, D) are taken for, where the median of their novelty to it is at most
    `familiar`; None where there is none."""
    if not identifier.task_ids or not len(features):
        return None
    found = identifier.predict(features)
    tasks, votes = np.unique(found.task_ids, return_counts=True)
    task = tasks[votes.argmax()]
    if votes.max() <= config.share * len(features):
        return None
    return int(task) if np.median(found.novelty[found.task_ids == task]) <= config.familiar else None
