"""Top-1 routing.

Switch Transformers (Fedus, Zoph and Shazeer, arXiv 2101.03961), equations 1 to 6: p = softmax(W x), the expert is the largest,
its weight is its probability as it is (that is how the gate learns), the loss is α · E · Σ_i f_i · P_i. In training the input
may be multiplied by uniform noise from 1 - ε to 1 + ε (their section 2.2, ε = 0.01). An expert takes the first ⌈γ·T/E⌉ of its tokens (equation 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss import balance_loss
from ..routes import RouterOutput
from .base import Router, loss_weight, positive, require
from .finite import router_dtype
from .topk_of import stable_topk


class SwitchRouter(Router):
    """k = 1.

    Attributes:
        balance_weight: α.
        jitter: ε, in training alone; from torch's generator.
        capacity_factor: γ; None leaves a limit to the layer.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        balance_weight: float = 0.01,
        jitter: float = 0.0,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, 1)
        loss_weight(self, balance_weight=balance_weight)
        positive(self, capacity_factor=capacity_factor)
        require(0.0 <= jitter < 1.0, self, "jitter", jitter, "a number from 0 to below 1")
        self.balance_weight, self.jitter, self.capacity_factor = balance_weight, jitter, capacity_factor

    def route(self, x_TD: Tensor) -> RouterOutput:
        """The largest probability."""
        if self.training and self.jitter:
            wide = x_TD.to(router_dtype(x_TD))
            x_TD = wide * (1.0 + self.jitter * (2.0 * torch.rand_like(wide) - 1.0))
        logits = self.logits(x_TD)
        probabilities = logits.softmax(-1)
        weights, ids = stable_topk(probabilities, 1)
        losses = {"balance": (self.balance_weight, lambda load: balance_loss(probabilities, load))}
        return self.output(ids, weights, logits, losses, capacity_factor=self.capacity_factor)


def switch_loss_reference(probabilities: list[list[float]]) -> float:
    """E · Σ f_i P_i by the formulas, with ties to the lower expert."""
    tokens, experts = len(probabilities), len(probabilities[0])
    share, mean = [0.0] * experts, [0.0] * experts
    for row in probabilities:
        share[max(range(experts), key=lambda expert: (row[expert], -expert))] += 1.0 / tokens
        for expert, value in enumerate(row):
            mean[expert] += value / tokens
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))
