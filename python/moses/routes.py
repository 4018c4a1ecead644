"""What a router hands on: which experts each token goes to, with what weight, and what it cost. Immutable.

T tokens, k slots a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from .errors import DispatchError
from .plan import DispatchPlan


@dataclass(frozen=True, eq=False, repr=False)
class Routes:
    """Experts and weights of T tokens.

    Attributes:
        expert_ids: (T, k) int64 in [0, E); -1 where a slot names nobody (GShard's second expert, expert choice).
        weights: (T, k) float32, float64 for float64 input; 0 where a slot names nobody.
        may_skip: whether a slot may name nobody. Known without a look at the data, so that nothing waits for a device.
    """

    expert_ids: Tensor
    weights: Tensor
    may_skip: bool = False

    def __post_init__(self) -> None:
        ids, weights = self.expert_ids, self.weights
        if ids.ndim != 2 or ids.shape != weights.shape or ids.dtype != torch.int64 or not weights.is_floating_point():
            raise DispatchError(
                f"routes have expert_ids {tuple(ids.shape)} {ids.dtype} and weights {tuple(weights.shape)} {weights.dtype}: "
                "give int64 and floats of one shape (tokens, slots)",
                code="dispatch_arguments",
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """k, slots a token."""
        return self.expert_ids.shape[1]

    def __repr__(self) -> str:
        return (
            f"Routes(num_tokens={self.num_tokens}, top_k={self.top_k}, {self.weights.dtype}, {self.expert_ids.device})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class RouterOutput:
    """Routes, and what the router has to say of them.

    Attributes:
        routes: experts and weights.
        logits: (T, E) before any normalisation, float32 or float64; None for a router that computes none (a table).
        losses: scalar losses by name, weighted as the router was told; add them to the task's loss. Empty where there are none.
        load: (E,) int64, tokens that each expert was given before any capacity.
        plan: for a router that chooses tokens for its experts (expert choice), the plan of its choice.
        dropped: () int64, pairs (token, slot) that an expert had no room for; None before dispatch.
    """

    routes: Routes
    logits: Tensor | None
    load: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    plan: DispatchPlan | None = None
    dropped: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", MappingProxyType(dict(self.losses)))

    @property
    def loss(self) -> Tensor:
        """() sum of the losses, 0 where there are none."""
        return sum(self.losses.values(), self.routes.weights.new_zeros(()))

    @property
    def load_variation(self) -> Tensor:
        """() float64 coefficient of variation of `load`: deviation over mean, 0 for perfect balance and for no tokens."""
        load = self.load.double()
        return load.std(correction=0) / load.mean().clamp(min=1e-300)

    @property
    def dropped_fraction(self) -> Tensor:
        """() float64, dropped pairs of all routed ones; 0 before dispatch and for no tokens."""
        if self.dropped is None:
            return self.load.new_zeros((), dtype=torch.float64)
        return self.dropped.double() / self.load.sum().clamp(min=1)

    def __repr__(self) -> str:
        losses = ", ".join(self.losses) or "none"
        return f"RouterOutput({self.routes!r}, num_experts={self.load.shape[0]}, losses: {losses})"


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """⌈γ·T·k/E⌉, at least 1: the pairs that an expert takes (GShard, arXiv 2006.16668, section 2.2, with its group as the batch).

    In whole numbers, with γ to six decimals: in floats 1.1 · 10 is above 11, and would be 12 pairs.
    """
    millionths = round(factor * 1_000_000)
    return max(1, -(-num_tokens * top_k * millionths // (1_000_000 * num_experts)))


def expert_load(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(E,) int64 pairs a expert from (T, k) ids, -1 counting for nobody; integer sums, the same on every device."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    flat = expert_ids.flatten()
    flat = torch.where(flat < 0, num_experts, flat)
    return counts.scatter_add(0, flat, torch.ones_like(flat))[:num_experts]
