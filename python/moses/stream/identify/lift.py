"""Random features: a fixed random map from a model's features to `num_features` numbers, made anew from a seed and
never stored.

The map is a leaky ReLU of an orthogonal projection (Saxe et al. 2011; random features in analytic continual learning:
ACIL, Zhuang et al. 2022), so that it keeps what is linear and adds what is not; the last feature is the constant 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAK = 0.3
_TINY = 1e-12


class RandomFeatures:
    """x (B, D) -> (B, num_features) float64. Each row is first brought to a root mean square of 1: only its direction
    counts."""

    def __init__(self, feature_dim: int, num_features: int, seed: int) -> None:
        self.projection = _orthogonal(feature_dim, num_features - 1, seed)

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features of each row; they depend on that row alone."""
        rms = np.sqrt(np.mean(x * x, axis=1, keepdims=True))
        z = (x / np.maximum(rms, _TINY)) @ self.projection
        return np.concatenate([np.maximum(z, LEAK * z), np.ones((len(z), 1))], axis=1)


def _orthogonal(rows: int, columns: int, seed: int) -> NDArray[np.float64]:
    """A random (rows, columns) matrix with orthogonal columns (rows where there are fewer of them), its entries about
    1/√rows."""
    # RandomState, not default_rng: NumPy promises that its stream never changes, and stored statistics depend on it
    gaussian = np.random.RandomState(seed).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(gaussian)
    q = q * np.sign(np.diag(r))  # with a positive diagonal the factorisation is unique, whatever LAPACK is in use
    return q if rows >= columns else np.ascontiguousarray(q.T)
