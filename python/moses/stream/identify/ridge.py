"""Analytic ridge regression from random features to the task (ACIL, Zhuang et al. 2022; design: recursive, forgets
nothing).

What is kept of task t is its own: the count n_t, the sum s_t and the Gram matrix G_t = ΣφφT of its random features. The
answer for T tasks is

    W = (1/T Σ_t G_t/n_t + λI)⁻¹ · 1/T [s_1/n_1 ... s_T/n_T]       (M, T)

the ridge regression over all prompts of all tasks at once, each task with the same weight. Sums run over ascending ids
in float64, so neither the order of arrival nor a task that came and went leaves a trace: not beyond rounding, but none
at all.

Novelty of φ to a task is its leverage on the task's own Gram, φT(G_t/n_t + λI)⁻¹φ. What is usual for the task's own
prompts comes from the same expression with each prompt (all its views) left out, exactly, by a block downdate; no other
task's data are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moses.stream.identify.config import IdentifierConfig
from moses.stream.identify.lift import RandomFeatures

Matrix = NDArray[np.float64]
State = Mapping[str, NDArray[Any]]


class Ridge:
    """The kind "ridge": see above. `feature_dim`: D, the width of the model's features."""

    sharpness = 10.0  # of 2 ... 20 this had the lowest log loss on stream8's eval parts, without templates

    def __init__(self, config: IdentifierConfig, feature_dim: int) -> None:
        self.ridge = config.ridge
        self.num_features = config.num_features
        self.lift = RandomFeatures(feature_dim, config.num_features, config.seed)
        self._upper = np.triu_indices(config.num_features)

    def layout(self) -> dict[str, tuple[str, int]]:
        """What is kept of a task: name -> (dtype, length)."""
        return {"sum": ("float64", self.num_features), "gram": ("float32", len(self._upper[0]))}

    def summarise(self, x: Matrix, groups: Sequence[NDArray[np.intp]]) -> tuple[dict[str, NDArray[Any]], Matrix]:
        """What is kept of a task with features x (n, D), and the logarithm of each row's leverage with its group left
        out (n,)."""
        phi = self.lift(x)
        gram = (phi.T @ phi)[self._upper].astype(np.float32)
        mean = self._gram({"gram": gram}) / len(phi)
        mean[np.diag_indices_from(mean)] += self.ridge
        half = np.linalg.solve(np.linalg.cholesky(mean), phi.T)  # (M, n): its columns' inner products are the leverages
        leverage = np.empty(len(phi))
        for rows in groups:
            block = half[:, rows].T @ half[:, rows] / len(phi)
            left_out = np.linalg.solve(np.eye(len(rows)) - block, block)
            leverage[rows] = len(phi) * np.diag(left_out)
        return {"sum": phi.sum(axis=0), "gram": gram}, np.log(leverage)

    def join(self, states: Sequence[State], counts: Sequence[int]) -> Matrix:
        """W (M, T) of the tasks in the order given."""
        gram = np.zeros((self.num_features, self.num_features))
        for state, count in zip(states, counts, strict=True):
            gram += self._gram(state) / count
        gram /= len(states)
        gram[np.diag_indices_from(gram)] += self.ridge
        means = np.stack([state["sum"] / count for state, count in zip(states, counts, strict=True)], axis=1)
        return np.asarray(np.linalg.solve(gram, means / len(states)), np.float64)

    def scores(self, joint: Matrix, x: Matrix) -> Matrix:
        """(B, T): about the probability of each task; a row sums to about 1."""
        return self.lift(x) @ joint

    def certainty(self, scores: Matrix, probabilities: Matrix) -> Matrix:
        """(B,) the winner's score, which keeps more of a doubt than its sharpened probability."""
        certainty: Matrix = scores.max(axis=1)
        return certainty

    def deviation(self, state: State, count: int, x: Matrix, column: int) -> Matrix:
        """Logarithm of each row's leverage on the task (B,)."""
        mean = self._gram(state) / count
        mean[np.diag_indices_from(mean)] += self.ridge
        half = np.linalg.solve(np.linalg.cholesky(mean), self.lift(x).T)
        leverage: Matrix = (half * half).sum(axis=0)
        return np.log(leverage)

    def _gram(self, state: State) -> Matrix:
        gram = np.zeros((self.num_features, self.num_features))
        gram[self._upper] = state["gram"]
        return gram + np.triu(gram, 1).T
