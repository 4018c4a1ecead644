"""Expert choice: every expert takes its best tokens, so load is balanced by construction.

Zhou et al., Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368), section 3.2: S = softmax over experts of X · W_g;
each expert takes the C = ⌈T · c / E⌉ tokens with its largest scores, and weighs them by those; a token may be taken by several
experts or by none. The choice of a token looks at later tokens: not for autoregressive decoding, as the paper says.

The routes have a slot an expert (k = E), -1 where the expert did not take the token; the output's `plan` is the choice itself, E · C
rows, so that the experts compute what they take and not T · E; only the routes and the plan's inverse have T · E entries, as the logits do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import DispatchPlan, index_dtype
from ..routes import RouterOutput, Routes, expert_capacity, expert_load
from .base import Router, require
from .topk_of import stable_topk


class ExpertChoiceRouter(Router):
    """Attributes: `capacity`, c, the mean number of experts a token gets."""

    def __init__(self, d_model: int, num_experts: int, capacity: float = 2.0) -> None:
        super().__init__(d_model, num_experts, num_experts)
        require(
            0.0 < capacity <= num_experts,
            self,
            "capacity",
            capacity,
            f"a number above 0, at most num_experts ({num_experts})",
        )
        self.capacity = capacity

    def route(self, x_TD: Tensor) -> RouterOutput:
        """Of equal scores the earlier token is taken. The plan's rows are by expert, then token, as in every plan."""
        logits = self.logits(x_TD)
        num_tokens, num_experts = logits.shape
        scores = logits.softmax(-1)
        room = min(num_tokens, expert_capacity(num_tokens, 1, num_experts, self.capacity))
        best_EC = logits.new_zeros(num_experts, 0, dtype=torch.int64)
        if room:
            best_EC = stable_topk(scores.detach().T.contiguous(), room)[1]
        tokens_EC = best_EC.sort(dim=-1).values
        slot = torch.arange(num_experts, device=logits.device)
        pairs = (tokens_EC * num_experts + slot[:, None]).flatten()
        taken = torch.zeros(num_tokens * num_experts, dtype=torch.bool, device=logits.device).scatter(0, pairs, True)
        taken = taken.view(num_tokens, num_experts)
        ids = torch.where(taken, slot, -1)
        weights = scores * taken
        dtype = index_dtype(num_tokens * num_experts, pairs.shape[0])
        rows = torch.arange(pairs.shape[0], device=logits.device)
        inverse = torch.full((num_tokens * num_experts,), -1, device=logits.device).scatter(0, pairs, rows)
        counts = torch.full((num_experts,), room, dtype=torch.int64, device=logits.device)
        plan = DispatchPlan(
            order=pairs.to(dtype),
            inverse=inverse.to(dtype),
            offsets=torch.arange(num_experts + 1, device=logits.device) * room,
            counts=counts,
            num_tokens=num_tokens,
            top_k=num_experts,
            num_experts=num_experts,
        )
        return RouterOutput(Routes(ids, weights, may_skip=True), logits, expert_load(ids, num_experts), {}, plan)


def expert_choice_reference(scores: list[list[float]], room: int) -> list[list[int]]:
    """The tokens of each expert in the order of its choice."""
    experts = range(len(scores[0]))
    return [sorted(range(len(scores)), key=lambda token: (-scores[token][expert], token))[:room] for expert in experts]
