"""What was found, against the true boundaries, which only the scoring knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DriftScore:
    """Changes found, counted in sequences from the stream's start.

    Attributes:
        boundaries: the first sequence of every visit of a domain but the first.
        found: after how many sequences of its visit each boundary's change was found; None where it was missed.
        false_alarms: changes found where there was none, or again in the same visit.
        returns: for each visit of a domain that was there before, whether it went on as that domain's task.
        new: for each visit of a new domain, whether it opened a task of its own.
    """

    boundaries: tuple[int, ...]
    found: tuple[int | None, ...]
    false_alarms: int
    returns: tuple[bool, ...]
    new: tuple[bool, ...]

    @property
    def longest_delay(self) -> int | None:
        """Of the changes found; None where one was missed."""
        delays = [delay for delay in self.found if delay is not None]
        return max(delays, default=0) if len(delays) == len(self.found) else None

    def to_json(self) -> dict[str, Any]:
        """The fields, and the longest delay."""
        return {**asdict(self), "longest_delay": self.longest_delay}


def score_changes(
    visits: Sequence[tuple[str, int]], alarms: Sequence[int], segments: Sequence[tuple[int, str]]
) -> DriftScore:
    """Score what was found.

    Args:
        visits: the true domain and length in sequences of each visit, in order.
        alarms: how many sequences had been read when each change was found, ascending.
        segments: the first sequence and the task of each segment, ascending.
    """
    starts, total = [], 0
    for _, length in visits:
        starts.append(total)
        total += length
    ends = [*starts[1:], total]
    found: list[int | None] = []
    true_alarms = 0
    for start, end in zip(starts[1:], ends[1:], strict=True):
        inside = [alarm - start for alarm in alarms if start < alarm <= end]
        found.append(inside[0] if inside else None)
        true_alarms += bool(inside)
    tasks = [_most_common_task(start, end, segments, total) for start, end in zip(starts, ends, strict=True)]
    returns, new = [], []
    for place, (domain, _) in enumerate(visits):
        earlier = {tasks[before] for before in range(place) if visits[before][0] == domain}
        if earlier:
            returns.append(tasks[place] in earlier)
        else:
            new.append(tasks[place] not in {tasks[before] for before in range(place)})
    return DriftScore(tuple(starts[1:]), tuple(found), len(alarms) - true_alarms, tuple(returns), tuple(new))


def _most_common_task(start: int, end: int, segments: Sequence[tuple[int, str]], total: int) -> str:
    lengths: dict[str, int] = {}
    for place, (begin, task) in enumerate(segments):
        stop = segments[place + 1][0] if place + 1 < len(segments) else total
        lengths[task] = lengths.get(task, 0) + max(0, min(end, stop) - max(start, begin))
    return max(lengths, key=lambda task: lengths[task])
