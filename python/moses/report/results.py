"""results.json as immutable types. Every field is checked once here, so that nothing behind it has to ask again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moses.errors import FormatError, RunError

MAX_RESULTS_BYTES = 16 << 20
"""A thousand tasks need about 12 MB; more is damaged or hostile."""

MAX_TASKS = 1000
"""A picture of more cells than a million helps nobody."""

T = TypeVar("T")
Scores = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Mode:
    """What was measured in one mode. `matrix[t][i]`: the score on task i after training task t; None is no score."""

    matrix: tuple[Scores, ...]
    metrics: Mapping[str, float | None]
    task_accuracy: float | None
    confusion: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one task added, in bytes by kind, and the share of the bank in use after it (None: there is no bank)."""

    task: str
    bytes: Mapping[str, int]
    bank_fraction: float | None

    @property
    def total_bytes(self) -> int:
        """All bytes that the task added."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Results:
    """A run's results.

    `base[i]` is R[0][i]; `expert_use[task][router]` the share of tokens that each expert got; `similar[task]` the task
    that it started from; `task_metrics[task]` what its score is; `lower_is_better` whether scores fall as a model learns;
    `command` what makes such a run; `online` and `budget` what was measured without task boundaries and of a budget, if it was.
    """

    path: Path
    method: str
    tasks: tuple[str, ...]
    base: Scores | None
    til: Mode | None
    tail: Mode | None
    capacity: tuple[Capacity, ...]
    overlap: tuple[tuple[int, ...], ...] | None
    expert_use: Mapping[str, Mapping[str, tuple[float, ...]]]
    similar: Mapping[str, str]
    task_metrics: Mapping[str, str]
    seconds: Mapping[str, float]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    lower_is_better: bool = False
    command: str | None = None
    online: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score_name(self) -> str:
        """What a score of the run is, in words."""
        return "perplexity, lower is better" if self.lower_is_better else "scores from 0 to 100"


def read_results(run: str | Path) -> Results:
    """Read and check `run/results.json` (or the file itself).

    Raises RunError where there is none yet, FormatError with path, field and mend where it is damaged.
    """
    path = Path(run) / "results.json" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        known = Path(run).exists()
        mend = "finish it with 'moses train ... --resume'" if known else "check the path"
        raise RunError(f"{path}: there are no results of a run here; {mend}", code="results_missing")
    if path.stat().st_size > MAX_RESULTS_BYTES:
        raise _damaged(path, "the file", f"is larger than {MAX_RESULTS_BYTES} bytes")
    try:
        document = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "the file", f"is not JSON ({error})") from None
    return _results(_Field(path, "results", document))


def _results(root: _Field) -> Results:
    tasks = root.get("tasks").items(_Field.text)
    size = len(tasks)
    if not 0 < size <= MAX_TASKS:
        raise root.get("tasks").wrong(f"has {size} names where 1 to {MAX_TASKS} are expected")
    if len(set(tasks)) != size:
        raise root.get("tasks").wrong("names a task twice")
    return Results(
        path=root.path,
        method=root.get("method").text(),
        tasks=tasks,
        base=root.maybe("base", lambda found: found.items(_Field.score, size)),
        til=root.maybe("til", lambda found: _mode(found, size)),
        tail=root.maybe("tail", lambda found: _mode(found, size)),
        capacity=root.maybe("capacity", lambda found: found.items(_capacity)) or (),
        overlap=root.maybe("overlap", _square),
        expert_use=root.maybe("expert_use", lambda found: found.table(lambda task: task.table(_shares))) or {},
        similar=root.maybe("similar", lambda found: found.table(_Field.text)) or {},
        task_metrics=root.maybe("task_metrics", lambda found: found.table(_Field.text)) or {},
        seconds=root.maybe("seconds", _seconds) or {},
        config=root.maybe("config", _Field.mapping) or {},
        environment=root.maybe("environment", _Field.mapping) or {},
        lower_is_better=root.maybe("lower_is_better", _Field.flag) or False,
        command=root.maybe("command", _Field.text),
        online=root.maybe("online", _Field.mapping) or {},
        budget=root.maybe("budget", _Field.mapping) or {},
    )


def _mode(field: _Field, size: int) -> Mode:
    matrix = field.get("matrix").items(lambda row: row.items(_Field.score, size))
    if len(matrix) > size:
        raise field.get("matrix").wrong(f"has {len(matrix)} rows where there are {size} tasks")
    confusion = field.maybe("confusion", lambda rows: rows.items(lambda row: row.items(_Field.count, size + 1), size))
    return Mode(
        matrix=matrix,
        metrics=field.get("metrics").table(_Field.score),
        task_accuracy=field.maybe("task_accuracy", _Field.score),
        confusion=confusion,
    )


def _capacity(field: _Field) -> Capacity:
    return Capacity(
        task=field.get("task").text(),
        bytes=field.get("bytes").table(_Field.count),
        bank_fraction=field.maybe("bank_fraction", _Field.share),
    )


def _square(field: _Field) -> tuple[tuple[int, ...], ...]:
    rows = field.items(lambda row: row.items(_Field.count))
    if any(len(row) != len(rows) for row in rows):
        raise field.wrong("is not square")
    return rows


def _shares(field: _Field) -> tuple[float, ...]:
    return field.items(_Field.share)


def _seconds(field: _Field) -> dict[str, float]:
    numbers = {name: value for name, value in field.mapping().items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items()}


@dataclass(frozen=True, slots=True)
class _Field:
    """A value of the document with its name, so that an error can say where it is."""

    path: Path
    name: str
    value: Any

    def wrong(self, problem: str) -> FormatError:
        return _damaged(self.path, self.name, problem)

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.wrong("is not an object")
        return self.value

    def get(self, key: str) -> _Field:
        if key not in self.mapping():
            raise self.wrong(f"lacks {key!r}")
        return _Field(self.path, f"{self.name}.{key}", self.value[key])

    def maybe(self, key: str, read: Callable[[_Field], T]) -> T | None:
        return None if self.mapping().get(key) is None else read(self.get(key))

    def items(self, read: Callable[[_Field], T], size: int | None = None) -> tuple[T, ...]:
        if not isinstance(self.value, list):
            raise self.wrong("is not a list")
        if size is not None and len(self.value) != size:
            raise self.wrong(f"has {len(self.value)} entries where {size} are expected")
        return tuple(read(_Field(self.path, f"{self.name}[{at}]", value)) for at, value in enumerate(self.value))

    def table(self, read: Callable[[_Field], T]) -> dict[str, T]:
        return {key: read(self.get(key)) for key in self.mapping()}

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("is not a text")
        return self.value

    def score(self) -> float | None:
        return None if self.value is None else self._number()

    def share(self) -> float:
        share = self._number()
        if not 0 <= share <= 1 + 1e-6:
            raise self.wrong(f"is {share:g}, not a share from 0 to 1")
        return share

    def count(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not 0 <= self.value < 1 << 63:
            raise self.wrong("is not a count")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("is not true or false")
        return self.value

    def _number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise self.wrong("is not a finite number")
        return float(self.value)


def _damaged(path: Path, field: str, problem: str) -> FormatError:
    mend = "write it again with 'moses train ... --resume'"
    return FormatError(f"{path}: {field} {problem}; {mend}", code="results_damaged")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
