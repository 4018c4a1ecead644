"""What the routers share: a gate of their own, arithmetic in float32 or wider, checked settings, and the output.

Shapes: T tokens, E experts, k experts a token, D model width. Whatever the model's dtype or autocast, logits, softmax and
top-k are in float32 (float64 for float64 input): rounding the softmax to bfloat16 would change routes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..routes import RouterOutput, Routes, expert_capacity, expert_load
from .capacity import first_come
from .finite import no_autocast, router_dtype
from .gate import gate_logits


def whole(router: object, **settings: int) -> None:
    """Raise `ConfigError` (`bad_setting`) unless every setting is a whole number of at least 1."""
    for setting, value in settings.items():
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(good, router, setting, value, "a whole number of at least 1")


def loss_weight(router: object, **settings: float) -> None:
    """Raise `ConfigError` (`bad_setting`) unless every setting, a loss's weight, is a finite number of at least 0."""
    for setting, value in settings.items():
        require(0.0 <= value < math.inf, router, setting, value, "a number of at least 0")


def positive(router: object, **settings: float | None) -> None:
    """Raise `ConfigError` (`bad_setting`) unless every setting is a finite number above 0, or None."""
    for setting, value in settings.items():
        require(value is None or 0.0 < value < math.inf, router, setting, value, "a number above 0, or None")


def require(condition: bool, router: object, setting: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` (`bad_setting`) unless a router's setting is as allowed."""
    if not condition:
        raise ConfigError(f"{type(router).__name__}.{setting} is {value!r}; it must be {allowed}", code="bad_setting")


class Router(nn.Module):
    """Base of the routers with a gate.

    Attributes:
        weight: (E, D) float32 parameter, a row an expert, in the order of the layer's experts; drawn normal with deviation D^-1/2.
        top_k: k, experts a token uses.
        num_experts: E.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        whole(self, d_model=d_model, num_experts=num_experts, top_k=top_k)
        require(top_k <= num_experts, self, "top_k", top_k, f"at most num_experts ({num_experts})")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.weight = nn.Parameter(torch.randn(num_experts, d_model) * d_model**-0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) finite logits in float32, float64 for float64 input."""
        dtype = router_dtype(x_TD)
        return gate_logits(x_TD.to(dtype), self.weight.to(dtype))

    def forward(self, x: Tensor) -> RouterOutput:
        """Route (..., D) tokens.

        Raises:
            ModelError: logits are NaN or infinite (`router_not_finite`); on CUDA an asynchronous assert.
        """
        with no_autocast(x):
            return self.route(x.reshape(-1, x.shape[-1]))

    @abstractmethod
    def route(self, x_TD: Tensor) -> RouterOutput:
        """Route (T, D) tokens; autocast is off."""

    def output(
        self,
        expert_ids: Tensor,
        weights: Tensor,
        logits: Tensor,
        losses: dict[str, tuple[float, Callable[[Tensor], Tensor]]],
        may_skip: bool = False,
        capacity_factor: float | None = None,
    ) -> RouterOutput:
        """The output of a choice.

        Args:
            expert_ids: (T, k) the choice, -1 for nobody.
            weights: (T, k).
            logits: (T, E).
            losses: by name (weight, function of the experts' load); one of weight 0 is not computed.
            may_skip: whether an id may be -1.
            capacity_factor: γ of the router's own capacity; None sets no limit.
        """
        load = expert_load(expert_ids, self.num_experts)
        found = {name: weight * make(load) for name, (weight, make) in losses.items() if weight}
        if capacity_factor is None:
            return RouterOutput(Routes(expert_ids, weights, may_skip), logits, load, found)
        num_tokens, top_k = expert_ids.shape
        capacity = expert_capacity(num_tokens, top_k, self.num_experts, capacity_factor)
        kept = first_come(expert_ids, self.num_experts, capacity)
        dropped = ((expert_ids >= 0) & ~kept).sum()
        routes = Routes(torch.where(kept, expert_ids, -1), weights.where(kept, 0.0), may_skip=True)
        return RouterOutput(routes, logits, load, found, dropped=dropped)

    def extra_repr(self) -> str:
        """Of nn.Module."""
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"
