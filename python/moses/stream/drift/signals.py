"""How far a sequence lies from what is usual in the segment, in standard deviations: by its features and by its loss.

Novelty is the task identifier's own: the leverage of a sequence's random features on those of the segment's reference (the
ridge of `moses.stream.identify`), against the leverage of each reference sequence with itself left out. What is usual is
learned from the reference, and does not follow what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moses.stream.identify import IdentifierConfig
from moses.stream.identify.ridge import Ridge

Vector = NDArray[np.float64]
MIN_NOVELTY_SPREAD = 0.05  # of log leverage: identical sequences have none
MIN_LOSS_SPREAD = 0.01  # nats a token


class Novelty:
    """Of features (B, 2, D), from the reference's (n, 2, D).

    Attributes:
        reference: (n,) deviations of the reference's own sequences, each left out.
    """

    def __init__(self, features: NDArray[Any], num_features: int) -> None:
        x = np.asarray(features, np.float64)
        self._ridge = _ridge(num_features, x.shape[1], x.shape[2])
        state, usual = self._ridge.summarise(x, list(np.arange(len(x))[:, None]))
        self._prepared = self._ridge.prepare(state, len(x))
        self._mean, self._spread = float(usual.mean()), max(float(usual.std()), MIN_NOVELTY_SPREAD)
        self.reference: Vector = (usual - self._mean) / self._spread

    def __call__(self, features: NDArray[Any]) -> Vector:
        """(B,) deviations."""
        deviation = self._ridge.deviation(self._prepared, np.asarray(features, np.float64), 0)
        return np.asarray((deviation - self._mean) / self._spread, np.float64)


@cache
def _ridge(num_features: int, num_vectors: int, feature_dim: int) -> Ridge:
    """One for all segments: its random map takes a while to draw."""
    return Ridge(IdentifierConfig(kind="ridge", num_features=num_features), num_vectors, feature_dim)


class Surprise:
    """Of losses (B,) in nats a token, from the reference's (n,).

    Attributes:
        reference: (n,) deviations of the reference's own losses.
    """

    def __init__(self, losses: Sequence[float]) -> None:
        values = np.asarray(losses, np.float64)
        self._mean, self._spread = float(values.mean()), max(float(values.std()), MIN_LOSS_SPREAD)
        self.reference: Vector = self(values)

    def __call__(self, losses: Sequence[float] | Vector) -> Vector:
        """(B,) deviations."""
        return (np.asarray(losses, np.float64) - self._mean) / self._spread
