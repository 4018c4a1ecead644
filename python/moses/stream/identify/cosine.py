"""Mean keys by cosine: a task's key is the mean direction of its prompts' features (the keys of L2P, Wang et al. 2022,
set and not learned).

It reads the last vector of a prompt's features, the layer's. Cheaper than the ridge (a key a task) and weaker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moses.stream.identify.config import IdentifierConfig

Matrix = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]
_TINY = 1e-12


class Cosine:
    """The kind "cosine". What is kept of a task is the sum of its prompts' features, each of length 1."""

    sharpness = 40.0  # the lowest log loss of 5 ... 80 on stream8's eval parts, middle layer

    def __init__(self, config: IdentifierConfig, num_vectors: int, feature_dim: int) -> None:
        self.feature_dim = feature_dim

    def layout(self) -> dict[str, tuple[str, int]]:
        """What is kept of a task: name -> (dtype, length)."""
        return {"sum": ("float64", self.feature_dim)}

    def summarise(self, x: Matrix, groups: Sequence[NDArray[np.intp]]) -> tuple[dict[str, NDArray[Any]], Matrix]:
        """What is kept of a task with features x (n, S, D), and the logarithm of each row's distance to the key without
        its group (n,)."""
        unit = _unit(x[:, -1])
        total = unit.sum(axis=0)
        distance = np.empty(len(unit))
        for rows in groups:
            others = total - unit[rows].sum(axis=0) if len(rows) < len(unit) else np.zeros_like(total)
            distance[rows] = 1.0 - unit[rows] @ _unit(others[None])[0]
        return {"sum": total}, _log(distance)

    def join(self, states: Sequence[State], counts: Sequence[int]) -> Matrix:
        """The keys (D, T) of the tasks in the order given."""
        return _unit(np.stack([np.asarray(state["sum"], np.float64) for state in states])).T

    def scores(self, joint: Matrix, x: Matrix) -> Matrix:
        """(B, T) cosines."""
        return _unit(x[:, -1]) @ joint

    def certainty(self, scores: Matrix, probabilities: Matrix) -> Matrix:
        """(B,) the winner's probability."""
        certainty: Matrix = probabilities.max(axis=1)
        return certainty

    def prepare(self, state: State, count: int) -> Matrix:
        """The task's key (D, 1)."""
        return self.join([state], [count])

    def deviation(self, prepared: Matrix, x: Matrix, column: int) -> Matrix:
        """Logarithm of 1 - cosine (B,)."""
        return _log(1.0 - self.scores(prepared, x)[:, 0])


def _unit(x: Matrix) -> Matrix:
    length: Matrix = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(length, _TINY)


def _log(distance: Matrix) -> Matrix:
    return np.log(np.maximum(distance, _TINY))
