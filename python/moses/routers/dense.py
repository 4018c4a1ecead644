"""Dense mixture: every token uses every expert, weighted by the softmax of the gate.

Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts (Neural Computation 3, 1991):
    p_i(x) = exp(w_i · x) / Σ_j exp(w_j · x),    y = Σ_i p_i(x) · E_i(x)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..routes import RouterOutput
from .base import Router


class DenseRouter(Router):
    """All experts, so k = E."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, num_experts)

    def route(self, x_TD: Tensor) -> RouterOutput:
        """Expert i is in slot i."""
        logits = self.logits(x_TD)
        ids = torch.arange(self.num_experts, device=x_TD.device).expand(logits.shape)
        return self.output(ids, logits.softmax(-1), logits, {})


def dense_reference(logits: list[list[float]]) -> list[list[float]]:
    """p of each token by the formula."""
    rows = []
    for row in logits:
        exponentials = [math.exp(value) for value in row]
        rows.append([value / sum(exponentials) for value in exponentials])
    return rows
