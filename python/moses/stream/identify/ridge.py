"""Analytic ridge regression from random features to the task (ACIL, Zhuang et al. 2022): joint by construction, so it
forgets nothing.

What is kept of task t is its own: the number of rows n_t, and mean m_t and second moment S_t of its random features φ.
With its share of the ridge, λ_t = max(λ/n_t, 0.001), the answer for T tasks is

    W = (1/T Σ_t (S_t + λ_t I))⁻¹ · 1/T [m_1 ... m_T]       (M, T)

the ridge regression on all prompts of all tasks at once, each task with the same weight. Sums run over ascending ids in
float64, so neither the order of arrival nor a task that came and went leaves a trace: not beyond rounding, but none.

S_t is kept as deviations (float64) and correlations (16 bits: their rounding, a matrix of norm below 0.0005, stays
under the ridge), which is what makes 690 features fit where float32 has room for 480.

Novelty of φ to a task is its leverage there, φᵀ(S_t + λ_t I)⁻¹φ. What is usual for the task's own prompts comes from
the same expression with each prompt (all its views) left out, by a block downdate; no other task's data are needed.
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

MIN_SHARE = 1e-3  # of the ridge: twice what the rounding of correlations can take away
STEPS = 32767  # a correlation of 1
_TINY = 1e-9


class Ridge:
    """The kind "ridge": see above. `feature_dim`: D, `num_vectors`: S of the features (n, S, D)."""

    sharpness = 10.0  # of 2 ... 20 this had the lowest log loss on stream8's eval parts, without templates

    def __init__(self, config: IdentifierConfig, num_vectors: int, feature_dim: int) -> None:
        self.ridge = config.ridge
        self.num_features = config.num_features
        self.lift = RandomFeatures(num_vectors, feature_dim, config.num_features, config.seed)
        self._above = np.triu_indices(config.num_features, 1)

    def layout(self) -> dict[str, tuple[str, int]]:
        """What is kept of a task: name -> (dtype, length)."""
        each = ("float64", self.num_features)
        return {"mean": each, "spread": each, "correlation": ("int16", len(self._above[0]))}

    def summarise(self, x: Matrix, groups: Sequence[NDArray[np.intp]]) -> tuple[dict[str, NDArray[Any]], Matrix]:
        """What is kept of a task with features x (n, S, D), and the logarithm of each row's leverage with its group
        left out (n,)."""
        phi = self.lift(x)
        mean = phi.mean(axis=0)
        covariance = (phi - mean).T @ (phi - mean) / len(phi)
        spread = np.sqrt(np.diag(covariance))
        scale = np.maximum(spread, _TINY)
        correlation = np.clip((covariance / scale[:, None] / scale)[self._above], -1.0, 1.0)
        state = {"mean": mean, "spread": spread, "correlation": np.rint(correlation * STEPS).astype(np.int16)}
        half = self.prepare(state, len(phi)) @ phi.T  # (M, n): inner products of its columns are leverages
        leverage = np.empty(len(phi))
        for rows in groups:
            block = half[:, rows].T @ half[:, rows] / len(phi)
            left_out = np.linalg.solve(np.eye(len(rows)) - block, block)
            leverage[rows] = len(phi) * np.diag(left_out)
        return state, np.log(leverage)

    def join(self, states: Sequence[State], counts: Sequence[int]) -> Matrix:
        """W (M, T) of the tasks in the order given."""
        moment = np.zeros((self.num_features, self.num_features))
        for state, count in zip(states, counts, strict=True):
            moment += self._regularised(state, count)
        means = np.stack([state["mean"] for state in states], axis=1)
        return np.asarray(np.linalg.solve(moment, means), np.float64)  # 1/T stands on both sides

    def scores(self, joint: Matrix, x: Matrix) -> Matrix:
        """(B, T): about the probability of each task; a row sums to about 1."""
        return self.lift(x) @ joint

    def certainty(self, scores: Matrix, probabilities: Matrix) -> Matrix:
        """(B,) the winner's score, which keeps more of a doubt than its sharpened probability."""
        certainty: Matrix = scores.max(axis=1)
        return certainty

    def prepare(self, state: State, count: int) -> Matrix:
        """L⁻¹ (M, M), where LLᵀ = S_t + λ_t I. Raises LinAlgError for a state that no features give."""
        return np.asarray(np.linalg.inv(np.linalg.cholesky(self._regularised(state, count))), np.float64)

    def deviation(self, prepared: Matrix, x: Matrix, column: int) -> Matrix:
        """Logarithm of each row's leverage on the task (B,)."""
        half = prepared @ self.lift(x).T
        leverage: Matrix = (half * half).sum(axis=0)
        return np.log(leverage)

    def _regularised(self, state: State, count: int) -> Matrix:
        """S_t + λ_t I (M, M)."""
        correlation = np.zeros((self.num_features, self.num_features))
        correlation[self._above] = state["correlation"] / STEPS
        correlation += correlation.T
        correlation[np.diag_indices_from(correlation)] = 1.0
        mean, spread = state["mean"], state["spread"]
        moment: Matrix = correlation * np.outer(spread, spread) + np.outer(mean, mean)
        moment[np.diag_indices_from(moment)] += max(self.ridge / count, MIN_SHARE)
        return moment
