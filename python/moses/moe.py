"""`MoELayer`: router -> plan -> gather -> experts -> combine. The one file that composes the stages.

Shapes: T tokens, k experts a token, E experts, D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .experts import Experts, Kind, UnevenExperts, compute_dtype
from .ops import combine, gather
from .plan import DispatchPlan, dispatch_plan
from .routers import TopKRouter
from .routes import RouterOutput, Routes, expert_capacity


class MoELayer(nn.Module):
    """A mixture of FFN experts, usable in any model.

    Args:
        d_model: D.
        d_ff: F, or one width an expert (then `num_experts` is their number).
        num_experts: E.
        top_k: k of the default router.
        router: a router of `moses.routers` for E experts, or a module of yours whose forward gives a `RouterOutput`; None makes a `TopKRouter`.
        experts: `gate_up_down`, `up_down` or `low_rank` (F is then the rank).
        activation: of `moses.experts.ACTIVATIONS`.
        capacity_factor: γ; an expert takes at most ⌈γ·T·k/E⌉ pairs of a batch (GShard, arXiv 2006.16668). None drops nothing.
        overflow: over the capacity, `drop` leaves the pairs out; `pad` does so too and gives every expert as many rows as the capacity, so that
            shapes do not depend on the routes.

    A token whose pairs are all dropped gets zeros: add the layer's output to its input, as Transformers do.

    Raises:
        ConfigError: a setting that cannot work.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | Sequence[int],
        num_experts: int = 16,
        top_k: int = 2,
        *,
        router: nn.Module | None = None,
        experts: Kind = "gate_up_down",
        activation: str = "silu",
        capacity_factor: float | None = None,
        overflow: Literal["drop", "pad"] = "drop",
    ) -> None:
        super().__init__()
        widths = [d_ff] if isinstance(d_ff, int) else list(d_ff)
        if not widths or any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
            raise ConfigError(
                f"MoELayer.d_ff is {d_ff!r}; it must be a width or a list of widths, each at least 1",
                code="bad_setting",
            )
        if not isinstance(d_ff, int):
            num_experts = len(widths)
        if capacity_factor is not None and not 0.0 < capacity_factor < math.inf:
            raise ConfigError(
                f"MoELayer.capacity_factor is {capacity_factor!r}; it must be a number above 0", code="bad_setting"
            )
        if overflow not in ("drop", "pad") or (overflow == "pad" and capacity_factor is None):
            raise ConfigError(
                f"MoELayer.overflow is {overflow!r}; it must be drop, or pad with a capacity_factor", code="bad_setting"
            )
        self.router = TopKRouter(d_model, num_experts, top_k) if router is None else router
        found = getattr(self.router, "num_experts", num_experts)
        if found != num_experts:
            raise ConfigError(
                f"MoELayer.router is for {found} experts, the layer has {num_experts}", code="bad_setting"
            )
        self.num_experts, self.capacity_factor, self.overflow = num_experts, capacity_factor, overflow
        self.experts: nn.Module = (
            Experts(d_model, d_ff, num_experts, experts, activation)
            if isinstance(d_ff, int)
            else UnevenExperts(d_model, widths, experts, activation)
        )

    def forward(self, x: Tensor, **routing: Any) -> tuple[Tensor, RouterOutput]:
        """(..., D) to (..., D) of x's dtype (autocast's, where it is on) and what the router says; `routing` goes to the router.

        Raises:
            ModelError: the router's logits are not finite.
            DispatchError: the router names an expert that is not there.
        """
        routed: RouterOutput = self.router(x, **routing)
        tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        plan = routed.plan or self.plan(routed.routes)
        y = combine(self.experts(gather(tokens, plan), plan), plan, routed.routes.weights)
        dropped = routed.load.sum() - plan.counts[: self.num_experts].sum()
        return y.view(x.shape), dataclasses.replace(routed, dropped=dropped)

    def plan(self, routes: Routes) -> DispatchPlan:
        """The plan of a batch's routes. Slots that name nobody go to one more expert, behind the others, whom nobody computes."""
        capacity = None
        if self.capacity_factor is not None:
            capacity = expert_capacity(routes.num_tokens, routes.top_k, self.num_experts, self.capacity_factor)
        ids, count = routes.expert_ids, self.num_experts
        if routes.may_skip:
            ids, count = torch.where(ids < 0, count, ids), count + 1
        return dispatch_plan(ids, count, capacity, pad=self.overflow == "pad")
