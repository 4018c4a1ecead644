"""Random features: a fixed random map from a model's features to `num_features` numbers, made anew from a seed and
never stored.

As many as there is room for are a random orthogonal projection; in a small model, where features are left over, the
rest are ReLUs of random directions (random features: Rahimi and Recht 2007; in analytic continual learning: ACIL,
Zhuang et al. 2022). The last feature is the constant 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_TINY = 1e-12


class RandomFeatures:
    """x (B, S, D) -> (B, num_features) float64. Each of the S vectors of a row counts by its direction alone."""

    def __init__(self, num_vectors: int, feature_dim: int, num_features: int, seed: int) -> None:
        # RandomState, not default_rng: NumPy promises that its stream never changes, and stored statistics depend on it
        random = np.random.RandomState(seed)
        width = num_vectors * feature_dim
        num_linear = min(width, num_features - 1)
        self.linear = _orthogonal(random, width, num_linear)
        self.directions = random.standard_normal((width, num_features - 1 - num_linear)) / np.sqrt(width)

    def __call__(self, x: Matrix) -> Matrix:
        """Features of each row; they depend on that row alone."""
        rms = np.sqrt(np.mean(x * x, axis=2, keepdims=True))
        flat = (x / np.maximum(rms, _TINY)).reshape(len(x), -1)
        parts = [flat @ self.linear, np.maximum(flat @ self.directions, 0.0), np.ones((len(x), 1))]
        return np.concatenate(parts, axis=1)


def _orthogonal(random: np.random.RandomState, rows: int, columns: int) -> Matrix:
    """A random (rows, columns) matrix, rows >= columns, whose columns are orthogonal and of length 1."""
    q, r = np.linalg.qr(random.standard_normal((rows, columns)))
    # with a positive diagonal of r the factorisation is unique, whatever LAPACK is in use
    return np.asarray(q * np.sign(np.diag(r)), np.float64)
