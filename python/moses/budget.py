"""Fixed capacity: the bytes that all tasks together add to a run never exceed a budget, at any commit.

Counted is every file that a task adds to or changes in the run folder: its weights, routers and heads, what the identifier keeps of it, and
the registry with its masks; superseded versions apart. A task is given what is left, and at least an equal share of the whole;
what is missing for that, earlier tasks give up, the least useful first by the method's own rule. What each loses is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import _core
from .checkpoint import task_files
from .errors import ConfigError, RunError
from .methods import Method
from .run_files import REGISTRY
from .stream.identify import TaskIdentifier

OVERHEAD = 3072
"""Bytes that a task's files may take beside its values: headers, names, its line in the registry."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([a-z]*)")


def parse_bytes(text: int | str) -> int:
    """`500kB`, `2MB`, `1.5GiB` or a plain number as bytes. Raises `ConfigError` for anything else, and for less than one."""
    found = _SIZE.fullmatch(str(text).strip().lower())
    size = 0
    if not isinstance(text, bool) and found and found[2] in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ConfigError(f"budget {text!r} is no size; write a number of bytes, 500kB, 2MB or 1GiB", code="bad_budget")
    return size


def identifier_features(budget: int, num_tasks: int) -> int:
    """Random features of an identifier that takes at most a third of the budget for all tasks; at least 16, at most 690."""
    share = budget // (3 * max(1, num_tasks))
    features = 690
    while features > 16 and features * (features + 15) > share:  # 2 bytes a pair of features, 16 a feature
        features -= 2
    return features


class Budget:
    """The budget of one run.

    Attributes:
        limit: bytes.
        given_up: what earlier tasks lost, before which task: [{"for", "lost": {task: share of its weights' size}}].
    """

    def __init__(self, limit: int, method: Method, identifier: TaskIdentifier, num_tasks: int) -> None:
        """Raises `ConfigError` where the budget does not hold `num_tasks` tasks of the smallest size, or the method keeps none."""
        self.limit, self._method, self._identifier = limit, method, identifier
        least = num_tasks * self._smallest()
        if limit < least:
            raise ConfigError(
                f"--budget is {limit} bytes, and {num_tasks} tasks of the smallest size take {least}: raise it, or lower "
                "identifier.num_features (or router_dim, rank)",
                code="budget_too_small",
            )
        self.given_up: list[dict[str, Any]] = []

    def make_room(self, name: str, files: Mapping[str, int]) -> list[str]:
        """Let task `name` begin within the budget; the earlier tasks that gave something up, whose files are to be written again.

        `files`: sizes of the run's files.
        """
        left = self.limit - used_bytes(files) - self._fixed()
        ended = len(self._method.registry.tasks())
        share = self.limit // (ended + 1) - self._fixed()
        wanted = max(left, min(share, self._method.usual_task()), self._method.smallest_task())
        changed = self._give_up(wanted - left, name) if wanted > left else []
        self._method.limit_task(wanted)
        return changed

    def fit(self, name: str, put: dict[str, bytes], files: Mapping[str, int]) -> None:
        """Make what a commit puts fit, in place: earlier tasks, and the new one, give up what is too much.

        Raises:
            RunError: nothing is left to give up.
        """
        while True:
            sizes = {**files, **{file: len(data) for file, data in put.items()}}
            excess = used_bytes(sizes) - self.limit
            if excess <= 0:
                return
            changed = self._give_up(excess, name)
            if not changed:
                raise RunError(
                    f"task {name!r} is {excess} bytes over the budget of {self.limit}, and no task has anything left to give up: "
                    "raise --budget; the run is as it was before the task",
                    code="budget_full",
                )
            for other in changed:
                put |= task_files(self._method, self._identifier, other)
            put[REGISTRY] = self._method.registry.to_bytes()

    def _smallest(self) -> int:
        return self._method.smallest_task() + self._fixed()

    def _fixed(self) -> int:
        return self._identifier.state_bytes + OVERHEAD

    def _give_up(self, num_bytes: int, name: str) -> list[str]:
        lost = self._method.give_up(num_bytes)
        if lost:
            self.given_up.append({"for": name, "lost": lost})
        return list(lost)


def used_bytes(files: Mapping[str, int]) -> int:
    """Bytes of the files that tasks add, of all files of a run by name."""
    return sum(size for name, size in files.items() if name.startswith(("tasks/", "identifier/")) or name == REGISTRY)


def store_sizes(store: _core.Store) -> dict[str, int]:
    """The sizes of a run's files by name."""
    return {name: info.bytes for name, info in store.files().items()}
