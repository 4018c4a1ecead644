"""The task identifier: what is known of each task, the joint solution, and the answer for a batch of prompts.

Guarantees: a task is added from its own features alone and leaves every other task's state untouched; the answer is a
function of the set of tasks and not of their order or history, bit for bit on one machine; removing a task is exact; a
task's state is the same in memory as on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moses.errors import ConfigError, FormatError, ModelError, RegistryError
from moses.stream.identify.config import MAX_TASK_BYTES, NUM_VECTORS, Identification, IdentifierConfig
from moses.stream.identify.cosine import Cosine
from moses.stream.identify.prompt_loss import PromptLoss
from moses.stream.identify.ridge import Ridge

Matrix = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]

FORMAT_VERSION = 1
MIN_SPREAD = 0.05  # of log novelty: a task of identical prompts has none, and would take any other prompt for unknown
MIN_CERTAINTY = 0.05  # scores of a regression can be negative
MAX_COUNT = 2**53  # float64 counts exactly up to here
MAX_PREPARED = 32  # a few MiB each
MAX_USUAL = 1e3  # of log novelty: e**1000 is no float64


class _Kind(Protocol):
    """One way to tell tasks apart; the methods are described where they are implemented."""

    sharpness: float

    def layout(self) -> dict[str, tuple[str, int]]: ...
    def summarise(self, x: Matrix, groups: Sequence[NDArray[np.intp]]) -> tuple[dict[str, NDArray[Any]], Matrix]: ...
    def join(self, states: Sequence[State], counts: Sequence[int]) -> Matrix: ...
    def scores(self, joint: Matrix, x: Matrix) -> Matrix: ...
    def certainty(self, scores: Matrix, probabilities: Matrix) -> Matrix: ...
    def prepare(self, state: State, count: int) -> Matrix: ...
    def deviation(self, prepared: Matrix, x: Matrix, column: int) -> Matrix: ...


_KINDS: dict[str, Callable[[IdentifierConfig, int, int], _Kind]] = {
    "ridge": Ridge,
    "cosine": Cosine,
    "prompt_loss": PromptLoss,
}


class TaskIdentifier:
    """Infers the task of a prompt from features of the frozen base model.

    `feature_dim`: D, the model's width: `prompt_features` gives (n, 2, D). Raises ConfigError where a task's state
    would not fit its half megabyte.
    """

    def __init__(self, config: IdentifierConfig, feature_dim: int) -> None:
        if isinstance(feature_dim, bool) or not isinstance(feature_dim, int) or feature_dim < 1:
            raise ConfigError(
                f"feature_dim is {feature_dim!r}: give the model's width, 1 or more", code="bad_identifier"
            )
        self.config = config
        self.feature_dim = feature_dim
        self._kind: _Kind = _KINDS[config.kind](config, NUM_VECTORS, feature_dim)
        size = self.state_bytes
        if size > MAX_TASK_BYTES - 2048:  # the rest of the file: header, count, settings
            raise ConfigError(
                f"identifier.kind {config.kind!r} would keep {size} bytes a task: use 'ridge'",
                code="bad_identifier",
            )
        self._states: dict[int, dict[str, NDArray[Any]]] = {}
        self._joint: Matrix | None = None
        self._prepared: dict[int, Matrix] = {}

    @property
    def state_bytes(self) -> int:
        """Bytes of the arrays that are kept of a task; its file has a header and a few numbers besides."""
        return sum(np.dtype(dtype).itemsize * length for dtype, length in self._kind.layout().values())

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks known, ascending."""
        return tuple(sorted(self._states))

    def add_task(self, task_id: int, features: Any, prompt_ids: Sequence[int] | None = None) -> None:
        """Learn a task from the features of its prompts, (n, 2, D), any float dtype, NumPy or torch; kind
        "prompt_loss": losses, (n, 1).

        `prompt_ids` (n,) names the prompt of each row, where prompts have several views (see `prompt_views`); None:
        each row its own. Raises RegistryError for a task that is known already, ConfigError for a wrong shape,
        ModelError for NaN or infinity.
        """
        self._check_id(task_id)
        if task_id in self._states:
            raise RegistryError(
                f"task {task_id} is in the identifier already: remove_task it first", code="duplicate_task"
            )
        x = self._checked(features, 1)
        if not len(x):
            raise ConfigError(f"task {task_id}: no features: give at least one prompt", code="bad_features")
        kept, deviations = self._kind.summarise(x, _groups(len(x), prompt_ids))
        usual = np.array([deviations.mean(), max(deviations.std(), MIN_SPREAD)])
        state = {"settings": self._settings(), "count": np.array([len(x)], np.int64), "usual": usual, **kept}
        self._keep(task_id, state)

    def remove_task(self, task_id: int) -> None:
        """Forget a task exactly: what remains is what would be there had it never come. Raises RegistryError for an
        unknown one."""
        self._known(task_id)
        del self._states[task_id]
        self._prepared.pop(task_id, None)
        self._joint = None

    def predict(self, features: Any) -> Identification:
        """Infer the task of each of B prompts from features (B, 2, D); kind "prompt_loss": losses (B, T), columns in
        ascending order of ids.

        Each row is judged alone. Raises RegistryError while no task is known, ConfigError for a wrong shape, ModelError
        for NaN or infinity.
        """
        tasks = self.task_ids
        if not tasks:
            raise RegistryError("the identifier knows no task: add_task one first", code="no_tasks")
        x = self._checked(features, len(tasks))
        if self._joint is None:
            self._joint = self._kind.join([self._states[task] for task in tasks], [self._count(task) for task in tasks])
        scores = self._kind.scores(self._joint, x)
        probabilities = np.exp(self._kind.sharpness * (scores - scores.max(axis=1, keepdims=True)))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        best = scores.argmax(axis=1)
        outside = np.empty(len(x))
        for column in np.unique(best):
            rows, task = best == column, tasks[column]
            mean, spread = self._states[task]["usual"]
            deviation = self._kind.deviation(self._prepare(task), x[rows], int(column))
            outside[rows] = (deviation - mean) / spread
        novelty = outside / np.clip(self._kind.certainty(scores, probabilities), MIN_CERTAINTY, 1.0)
        ids = np.asarray(tasks, np.int64)[best]
        return Identification(tasks, ids, probabilities, novelty, novelty > self.config.threshold)

    def task_state(self, task_id: int) -> dict[str, NDArray[Any]]:
        """All that is kept of a task, for a safetensors file; copies. Raises RegistryError for an unknown task."""
        return {name: array.copy() for name, array in self._known(task_id).items()}

    def load_task_state(self, task_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put a task back from what `task_state` gave. Raises FormatError for arrays that are damaged or of other
        settings."""
        self._check_id(task_id)
        if task_id in self._states:
            raise RegistryError(
                f"task {task_id} is in the identifier already: remove_task it first", code="duplicate_task"
            )
        self._check_state(task_id, arrays)
        self._keep(task_id, {name: np.array(array) for name, array in arrays.items()})

    def nbytes(self, task_id: int) -> int:
        """The size in bytes of the safetensors file of a task's state. Beyond these files nothing is stored: the rest
        comes from the seed."""
        from safetensors.numpy import save

        return len(save({name: np.asarray(array) for name, array in self._known(task_id).items()}))

    def _keep(self, task_id: int, state: dict[str, NDArray[Any]]) -> None:
        for array in state.values():
            array.setflags(write=False)
        self._states[task_id] = state
        self._joint = None

    def _known(self, task_id: int) -> dict[str, NDArray[Any]]:
        if task_id not in self._states:
            known = ", ".join(map(str, self.task_ids)) or "none"
            raise RegistryError(f"the identifier does not know task {task_id}: it knows {known}", code="unknown_task")
        return self._states[task_id]

    def _count(self, task_id: int) -> int:
        return int(self._states[task_id]["count"][0])

    def _settings(self) -> NDArray[np.int64]:
        layer = -1 if self.config.layer is None else self.config.layer
        values = (FORMAT_VERSION, self.feature_dim, self.config.num_features, self.config.seed, layer)
        return np.array(values, np.int64)

    def _check_state(self, task_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        expected = {"settings": ("int64", 5), "count": ("int64", 1), "usual": ("float64", 2), **self._kind.layout()}
        if set(arrays) != set(expected):
            raise _damaged(task_id, f"arrays {sorted(arrays)} and not {sorted(expected)}")
        for name, (dtype, length) in expected.items():
            array = arrays[name]
            if array.dtype != np.dtype(dtype) or array.shape != (length,):
                raise _damaged(task_id, f"{name} is {array.dtype} {array.shape} and not {dtype} ({length},)")
            if not np.isfinite(array).all():
                raise _damaged(task_id, f"{name} is not finite")
        if arrays["settings"].tolist() != self._settings().tolist():
            raise FormatError(
                f"identifier of task {task_id}: (version, feature_dim, num_features, seed, layer) is "
                f"{arrays['settings'].tolist()}, not {self._settings().tolist()}: use the run's own settings",
                code="identifier_settings",
            )
        count, (mean, spread) = int(arrays["count"][0]), arrays["usual"].tolist()
        if not 1 <= count <= MAX_COUNT or abs(mean) > MAX_USUAL or not MIN_SPREAD <= spread <= MAX_USUAL:
            raise _damaged(task_id, "count or usual is out of range")
        largest = count * (NUM_VECTORS * self.feature_dim + 1)  # no feature is larger than √(2D), nor a sum of cosine's
        for name in self._kind.layout():
            if arrays[name].dtype == np.float64 and np.abs(arrays[name]).max() > largest:
                raise _damaged(task_id, f"{name} is larger than {count} prompts can make it")
        try:  # a matrix that no prompts could have given is found here, not at the first prompt
            self._kind.prepare(arrays, count)
        except np.linalg.LinAlgError:
            raise _damaged(task_id, "correlation is not positive") from None

    @staticmethod
    def _check_id(task_id: int) -> None:
        if isinstance(task_id, bool) or not isinstance(task_id, int) or not 0 <= task_id < 2**32:
            raise ConfigError(f"task id {task_id!r}: give an integer from 0 to 2**32 - 1", code="bad_task_id")

    def _prepare(self, task_id: int) -> Matrix:
        """What the kind prepares of a task to judge novelty, kept for the tasks that were asked for last."""
        prepared = self._prepared.pop(task_id, None)
        if prepared is None:
            prepared = self._kind.prepare(self._states[task_id], self._count(task_id))
        self._prepared[task_id] = prepared
        if len(self._prepared) > MAX_PREPARED:
            del self._prepared[next(iter(self._prepared))]
        return prepared

    def _checked(self, features: Any, num_losses: int) -> Matrix:
        shape = (num_losses,) if self.config.kind == "prompt_loss" else (NUM_VECTORS, self.feature_dim)
        if hasattr(features, "detach"):  # a torch tensor, of whatever dtype and device; bfloat16 has no NumPy dtype
            features = features.detach().cpu().double().numpy()
        x = np.asarray(features, dtype=np.float64)
        if x.shape[1:] != shape or x.ndim != len(shape) + 1:
            wanted = ", ".join(map(str, ("prompts", *shape)))
            raise ConfigError(f"features have the shape {x.shape}: give ({wanted})", code="bad_features")
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1) if x.size else np.zeros(len(x), bool)
        if bad.any():
            raise ModelError(
                f"features of row {int(bad.argmax())} are not finite: the model gave NaN or infinity",
                code="features_not_finite",
            )
        return x


def _groups(num_rows: int, prompt_ids: Sequence[int] | None) -> list[NDArray[np.intp]]:
    """The rows of each prompt."""
    if prompt_ids is None:
        return list(np.arange(num_rows)[:, None])
    ids = np.asarray(prompt_ids)
    if ids.shape != (num_rows,):
        raise ConfigError(
            f"prompt_ids has the shape {ids.shape}: give one id for each of {num_rows} rows", code="bad_features"
        )
    return [np.flatnonzero(ids == value) for value in np.unique(ids)]


def _damaged(task_id: int, what: str) -> FormatError:
    return FormatError(
        f"identifier of task {task_id}: {what}: the file is damaged, restore it or train the task again",
        code="identifier_state",
    )
