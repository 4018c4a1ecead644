"""Top-k routing as present models do it, with the choices by which they differ.

scoring       `softmax` over all experts before the choice (Mixtral's and Qwen's MoE with `normalise`, OLMoE without);
              `softmax_after` the choice, over the k alone (GptOss); `sigmoid` of each logit (DeepSeek-V3, arXiv 2412.19437, eq. 13 to 15).
normalise     divide the k weights by their sum (a single one stays as it is, for else the gate would not learn); then `scale`
              multiplies them (DeepSeek's routed scaling factor).
bias          loss-free balance (Wang et al., arXiv 2408.15664, eq. 3; DeepSeek-V3 eq. 16): a bias an expert is added for the choice and not
              for the weight; `update_bias` moves it by ±u after a step.
groups        group-limited (DeepSeek-V2/V3, arXiv 2412.19437, section 2.1.2): experts in `num_groups` equal groups, a group's score is the sum
              of its two best, and only the best `top_groups` groups are asked.
losses        `balance_weight` · E · Σ f_i P_i (Switch, arXiv 2101.03961), `z_weight` · mean (log Σ exp)² (ST-MoE, arXiv 2202.08906, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor

from ..loss import balance_loss, z_loss
from ..routes import RouterOutput
from .base import Router, loss_weight, positive, require, whole
from .topk_of import stable_topk

_TINY = 1e-20  # keeps the ratio finite where every sigmoid underflows, as DeepSeek-V3's code does
Scoring = Literal["softmax", "softmax_after", "sigmoid"]


class TopKRouter(Router):
    """A router with the settings above.

    Attributes:
        bias: (E,) float32 buffer of loss-free balance; None where it is off. It stays float32 when the model is cast to half precision,
            in which steps of u would soon be lost.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        scoring: Scoring = "softmax",
        normalise: bool = True,
        scale: float = 1.0,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        require(
            scoring in ("softmax", "softmax_after", "sigmoid"),
            self,
            "scoring",
            scoring,
            "softmax, softmax_after or sigmoid",
        )
        positive(self, scale=scale)
        loss_weight(self, balance_weight=balance_weight, z_weight=z_weight)
        whole(self, num_groups=num_groups, top_groups=top_groups)
        require(
            num_experts % num_groups == 0,
            self,
            "num_groups",
            num_groups,
            f"a divisor of num_experts ({num_experts})",
        )
        require(1 <= top_groups <= num_groups, self, "top_groups", top_groups, f"from 1 to num_groups ({num_groups})")
        room = top_groups * (num_experts // num_groups)
        require(top_k <= room, self, "top_k", top_k, f"at most the experts of top_groups groups ({room})")
        self.scoring, self.normalise, self.scale = scoring, normalise, scale
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.num_groups, self.top_groups = num_groups, top_groups
        self.register_buffer("bias", torch.zeros(num_experts) if bias else None)

    def route(self, x_TD: Tensor) -> RouterOutput:
        """The k largest by score and bias, in that order."""
        logits = self.logits(x_TD)
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        ranked = logits if self.scoring == "softmax_after" else scores
        if self.bias is not None:
            ranked = ranked + self.bias.to(ranked.dtype)
        if self.top_groups < self.num_groups:
            ranked = limit_groups(ranked, self.num_groups, self.top_groups)
        _, ids = stable_topk(ranked.detach(), self.top_k)
        if self.scoring == "softmax_after":
            weights = logits.gather(-1, ids).softmax(-1)
        else:
            weights = scores.gather(-1, ids)
            if self.normalise and self.top_k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        share = scores / (scores.sum(-1, keepdim=True) + _TINY) if self.scoring == "sigmoid" else scores
        losses = {
            "balance": (self.balance_weight, lambda load: balance_loss(share, load)),
            "z": (self.z_weight, lambda _: z_loss(logits)),
        }
        return self.output(ids, weights * self.scale, logits, losses)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.bias is not None and self.bias.dtype in (torch.bfloat16, torch.float16):
            self.bias = before.to(self.bias.device)
        return self

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float = 1e-3) -> None:
        """b_i += u · sign(mean load - load_i), once after an optimizer step (arXiv 2408.15664, algorithm 1).

        Args:
            load: (E,) tokens of each expert in the batch, as in `RouterOutput.load`; summed over the processes where there are several.
            rate: u.
        """
        require(self.bias is not None, self, "bias", self.bias, "True to be updated")
        assert self.bias is not None
        load = load.to(self.bias.dtype)
        self.bias += rate * torch.sign(load.mean() - load)


def limit_groups(scores: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Scores (T, E) with -inf outside of the best groups; ties to the lower group."""
    grouped = scores.view(-1, num_groups, scores.shape[-1] // num_groups)
    best = stable_topk(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, stable_topk(best, top_groups)[1], True)
    return grouped.masked_fill(~chosen[..., None], float("-inf")).flatten(-2)


def topk_reference(
    logits: list[list[float]],
    top_k: int,
    scoring: Scoring = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
    bias: list[float] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> list[list[tuple[int, float]]]:
    """(expert, weight) of each slot of each token, by plain loops."""
    routes = []
    for row in logits:
        experts = range(len(row))
        total = sum(math.exp(value) for value in row)
        scores = [1.0 / (1.0 + math.exp(-v)) if scoring == "sigmoid" else math.exp(v) / total for v in row]
        ranked = [
            value + (bias[i] if bias else 0.0) for i, value in enumerate(row if scoring == "softmax_after" else scores)
        ]
        size = len(row) // num_groups
        groups = [sum(sorted(ranked[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda group: (-groups[group], group))[:top_groups]
        asked = [expert for expert in experts if expert // size in kept]
        ids = sorted(asked, key=lambda expert: (-ranked[expert], expert))[:top_k]
        if scoring == "softmax_after":
            whole = sum(math.exp(row[expert]) for expert in ids)
            weights = [math.exp(row[expert]) / whole for expert in ids]
        else:
            weights = [scores[expert] for expert in ids]
            if normalise and top_k > 1:
                weights = [weight / sum(scores[expert] for expert in ids) for weight in weights]
        routes.append([(expert, scale * weight) for expert, weight in zip(ids, weights, strict=True)])
    return routes
