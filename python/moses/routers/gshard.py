"""Top-2 gating with a random second expert.

GShard (Lepikhin et al., arXiv 2006.16668), section 2.2 and algorithm 1: gates are the softmax; the two largest, g1 and g2, are
normalised by their sum; the second expert is used with probability min(1, 2·g2), for where its weight is small it is worth
little; the loss is the mean over experts of (c_e / S) · m_e with c_e the tokens whose first choice is e and m_e the mean gate,
times E² here so that balance is 1, as in Switch. An expert takes ⌈γ·T·k/E⌉ pairs, all first choices before all second ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss import balance_loss
from ..routes import RouterOutput, expert_load
from .base import Router, loss_weight, positive
from .topk_of import stable_topk


class GShardRouter(Router):
    """k = 2. In evaluation, and with `random_second=False`, the second expert is always used.

    The draw is torch's generator's, so that activation checkpointing, which restores it, routes alike.

    Attributes:
        balance_weight: of the loss.
        random_second: whether the second expert is drawn, in training.
        capacity_factor: γ of the paper's capacity, with its priority; None leaves a limit to the layer. The paper's group is the batch here.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        balance_weight: float = 0.01,
        random_second: bool = True,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, 2)
        loss_weight(self, balance_weight=balance_weight)
        positive(self, capacity_factor=capacity_factor)
        self.balance_weight, self.random_second, self.capacity_factor = balance_weight, random_second, capacity_factor

    def route(self, x_TD: Tensor) -> RouterOutput:
        """Slot 0 is the first choice, slot 1 the second or nobody (-1, weight 0)."""
        logits = self.logits(x_TD)
        gates = logits.softmax(-1)
        values, ids = stable_topk(gates, 2)
        weights = values / values.sum(-1, keepdim=True)
        skips = self.training and self.random_second
        if skips:
            used = torch.rand_like(weights[:, 1]) < 2.0 * weights[:, 1]
            ids = torch.stack([ids[:, 0], torch.where(used, ids[:, 1], -1)], dim=1)
            weights = torch.stack([weights[:, 0], weights[:, 1] * used], dim=1)
        first = ids[:, :1]
        losses = {"balance": (self.balance_weight, lambda _: balance_loss(gates, expert_load(first, self.num_experts)))}
        return self.output(ids, weights, logits, losses, skips, self.capacity_factor)


def gshard_reference(gates: list[list[float]], draws: list[float]) -> list[list[tuple[int, float]]]:
    """(expert, weight) of both slots of each token by the algorithm; `draws` are its random numbers in [0, 1)."""
    routes = []
    for row, draw in zip(gates, draws, strict=True):
        first, second = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:2]
        total = row[first] + row[second]
        small = row[second] / total
        routes.append([(first, row[first] / total), (second, small) if draw < 2.0 * small else (-1, 0.0)])
    return routes
