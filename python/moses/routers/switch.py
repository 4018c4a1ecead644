"""Top-1 routing.

Switch Transformers (Fedus, Zoph and Shazeer, arXiv 2101.03961), equations 1 to 6: p = softmax(W x), the expert is the largest,
its weight is its probability as it is (that is how the gate learns), the loss is α · E · Σ_i f_i · P_i. In training the input
may be multiplied by uniform noise from 1 - ε to 1 + ε (their section 2.2, ε = 0.01). Capacity is the layer's (`capacity_factor`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..loss import balance_loss
from ..routes import RouterOutput
from .base import Router, require
from .topk_of import stable_topk


class SwitchRouter(Router):
    """k = 1.

    Attributes:
        balance_weight: α.
        jitter: ε, in training alone; from torch's generator.
    """

    def __init__(self, d_model: int, num_experts: int, *, balance_weight: float = 0.01, jitter: float = 0.0) -> None:
        super().__init__(d_model, num_experts, 1)
        require(0.0 <= balance_weight < math.inf, self, "balance_weight", balance_weight, "a number of at least 0")
        require(0.0 <= jitter < 1.0, self, "jitter", jitter, "a number from 0 to below 1")
        self.balance_weight, self.jitter = balance_weight, jitter

    def route(self, x_TD: Tensor) -> RouterOutput:
        """The largest probability."""
        if self.training and self.jitter:
            wide = x_TD.to(torch.float64 if x_TD.dtype == torch.float64 else torch.float32)
            x_TD = wide * (1.0 + self.jitter * (2.0 * torch.rand_like(wide) - 1.0))
        logits = self.logits(x_TD)
        probabilities = logits.softmax(-1)
        weights, ids = stable_topk(probabilities, 1)
        losses = {"balance": (self.balance_weight, lambda load: balance_loss(probabilities, load))}
        return self.output(ids, weights, logits, losses)


def switch_loss_reference(probabilities: list[list[float]]) -> float:
    """E · Σ f_i P_i by the formulas, with ties to the lower expert."""
    tokens, experts = len(probabilities), len(probabilities[0])
    share, mean = [0.0] * experts, [0.0] * experts
    for row in probabilities:
        share[max(range(experts), key=lambda expert: (row[expert], -expert))] += 1.0 / tokens
        for expert, value in enumerate(row):
            mean[expert] += value / tokens
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))
