"""The lowest prompt loss: the task whose parameters find the prompt most likely. The caller runs the model and gives
the losses.

A task is added with its own prompts' losses under its own parameters, (n, 1); prompts are judged by their losses under
every task's, (B, T) in ascending order of ids. A loss is the mean over the prompt's tokens, in nats. Nothing is kept of
a task but what is usual for it.
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


class PromptLoss:
    """The kind "prompt_loss"; `feature_dim` has no meaning to it."""

    sharpness = 10.0  # a tenth of a nat a token, times e

    def __init__(self, config: IdentifierConfig, num_vectors: int, feature_dim: int) -> None:
        pass

    def layout(self) -> dict[str, tuple[str, int]]:
        """What is kept of a task besides the count and what is usual: nothing."""
        return {}

    def summarise(self, x: Matrix, groups: Sequence[NDArray[np.intp]]) -> tuple[dict[str, NDArray[Any]], Matrix]:
        """Nothing, and the logarithm of each loss (n,)."""
        return {}, np.log(np.maximum(x[:, 0], _TINY))

    def join(self, states: Sequence[State], counts: Sequence[int]) -> Matrix:
        """Nothing is joint."""
        return np.empty((0, len(states)))

    def scores(self, joint: Matrix, x: Matrix) -> Matrix:
        """(B, T) losses, negated."""
        return -x

    def certainty(self, scores: Matrix, probabilities: Matrix) -> Matrix:
        """(B,) the winner's probability."""
        certainty: Matrix = probabilities.max(axis=1)
        return certainty

    def prepare(self, state: State, count: int) -> Matrix:
        """Nothing is prepared."""
        return np.empty((0, 0))

    def deviation(self, prepared: Matrix, x: Matrix, column: int) -> Matrix:
        """Logarithm of each row's loss under the task in `column` (B,)."""
        return np.log(np.maximum(x[:, column], _TINY))
