"""What the routers share: a gate of their own, arithmetic in float32 or wider, checked settings, and the output.

Shapes: T tokens, E experts, k experts a token, D model width. Whatever the model's dtype or autocast, logits, softmax and
top-k are in float32 (float64 for float64 input): rounding the softmax to bfloat16 would change routes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..routes import RouterOutput, Routes, expert_load
from .topk_of import check_finite


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
        for setting, value in (("d_model", d_model), ("num_experts", num_experts), ("top_k", top_k)):
            require(isinstance(value, int) and value >= 1, self, setting, value, "a whole number of at least 1")
        require(top_k <= num_experts, self, "top_k", top_k, f"at most num_experts ({num_experts})")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.weight = nn.Parameter(torch.randn(num_experts, d_model) * d_model**-0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) finite logits in float32, float64 for float64 input."""
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        return check_finite(F.linear(x_TD.to(dtype), self.weight.to(dtype)))

    def forward(self, x: Tensor) -> RouterOutput:
        """Route (..., D) tokens.

        Raises:
            ModelError: logits are NaN or infinite (`router_not_finite`); on CUDA an asynchronous assert.
        """
        with torch.autocast(x.device.type, enabled=False):
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
    ) -> RouterOutput:
        """The output of a choice; `losses` are (weight, function of the experts' load), and one of weight 0 is not computed."""
        load = expert_load(expert_ids, self.num_experts)
        found = {name: weight * make(load) for name, (weight, make) in losses.items() if weight}
        return RouterOutput(Routes(expert_ids, weights, may_skip), logits, load, found)

    def extra_repr(self) -> str:
        """Of nn.Module."""
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"
