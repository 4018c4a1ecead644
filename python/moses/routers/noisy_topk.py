"""Noisy top-k gating with importance and load losses.

Shazeer et al., Outrageously Large Neural Networks (arXiv 1701.06538), equations 3 to 11:
    H(x)_i = (x · W_g)_i + ε · softplus((x · W_noise)_i),  ε normal,    G(x) = softmax(keep the top k of H, else -∞)
    importance = Σ_x G(x),  L_importance = w · CV(importance)²
    P(x, i) = Φ(((x · W_g)_i - kth_excluding(H(x), k, i)) / softplus((x · W_noise)_i)),  load_i = Σ_x P(x, i),  L_load = w · CV(load)²
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import importance_loss, normal_cdf, squared_variation
from ..routes import RouterOutput
from .base import Router, loss_weight
from .finite import check_finite
from .gate import gate_logits
from .topk_of import stable_topk


class NoisyTopKRouter(Router):
    """Noise only in training mode, from torch's generator, so that activation checkpointing, which restores it, routes alike.

    Attributes:
        noise_weight: (E, D) float32, W_noise; zero at the start, as in the paper, as is the gate.
        importance_weight, load_weight: w of the two losses; 0 leaves one out. The load loss needs noise and k < E, and is there in
            training alone.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        loss_weight(self, importance_weight=importance_weight, load_weight=load_weight)
        self.importance_weight, self.load_weight = importance_weight, load_weight
        nn.init.zeros_(self.weight)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, d_model))

    def route(self, x_TD: Tensor) -> RouterOutput:
        """Top-k of the noisy logits; `logits` of the output are the clean ones."""
        clean = self.logits(x_TD)
        noisy, spread = clean, None
        if self.training:
            spread = F.softplus(gate_logits(x_TD.to(clean.dtype), self.noise_weight.to(clean.dtype)))
            noisy = check_finite(clean + torch.randn_like(clean) * spread)
        values, ids = stable_topk(noisy, self.top_k)
        weights = values.softmax(-1)
        gates = torch.zeros_like(clean).scatter(-1, ids, weights)
        losses = {"importance": (self.importance_weight, lambda _: importance_loss(gates))}
        if spread is not None and self.top_k < self.num_experts:
            losses["load"] = (
                self.load_weight,
                lambda _: squared_variation(smooth_load(clean, noisy, spread, self.top_k)),
            )
        return self.output(ids, weights, clean, losses)


def smooth_load(clean: Tensor, noisy: Tensor, spread: Tensor, top_k: int) -> Tensor:
    """(E,) expected tokens of each expert under fresh noise on it alone (equations 8 to 10); k < E."""
    values, ids = stable_topk(noisy, top_k + 1)
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(
        -1, ids[:, :top_k], torch.ones_like(ids[:, :top_k], dtype=torch.bool)
    )
    # kth_excluding: without expert i itself, the k-th largest is the (k+1)-th of all where i is among the k
    threshold = torch.where(chosen, values[:, top_k, None], values[:, top_k - 1, None])
    # Where the noise is gone Φ is a step, and 0 / 0 would be NaN.
    return normal_cdf((clean - threshold) / spread.clamp(min=1e-6)).sum(0)


def smooth_load_reference(
    clean: list[list[float]], noisy: list[list[float]], spread: list[list[float]], top_k: int
) -> list[float]:
    """The same, expert by expert."""
    load = [0.0] * len(clean[0])
    for row, noise, width in zip(clean, noisy, spread, strict=True):
        for expert, value in enumerate(row):
            others = sorted((noise[other] for other in range(len(noise)) if other != expert), reverse=True)
            load[expert] += 0.5 * (1.0 + math.erf((value - others[top_k - 1]) / width[expert] / math.sqrt(2.0)))
    return load
