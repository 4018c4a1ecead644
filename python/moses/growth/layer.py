"""moses's own mixture in the place of an FFN of a transformers model, and how a caller reaches its router.

T tokens, E experts, D model width, F expert width. A block of transformers calls its FFN with (..., D) and takes (..., D): what the router
says has no way out by the return value. It goes through the context instead, never through the module:

    with route(token_ids=ids, domains=0) as outputs:     # keywords of the router; none for a router with a gate
        loss = model(input_ids=ids, labels=ids).loss
    loss = loss + sum(output.loss for output in outputs.values())
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..experts import Experts, Kind, compute_dtype, settings
from ..moe import MoELayer
from ..ops import grouped_linear
from ..ops.ffn import hide
from ..plan import DispatchPlan
from ..routes import RouterOutput

_ROUTING: ContextVar[tuple[dict[str, Any], dict[str, RouterOutput]] | None] = ContextVar("routing", default=None)


@contextmanager
def route(**routing: Any) -> Iterator[dict[str, RouterOutput]]:
    """Hand `routing` to the router of every layer called inside; yields what they said, by the layer's block."""
    outputs: dict[str, RouterOutput] = {}
    token = _ROUTING.set((routing, outputs))
    try:
        yield outputs
    finally:
        _ROUTING.reset(token)


@cache
def _keywords(router: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(router.forward).parameters) - {"self", "x"}


class _Tokens:
    """Hooks that hand a model's token ids to its tables for the time of one forward."""

    def __init__(self) -> None:
        self.tokens: list[Token[Any]] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing, outputs = _ROUTING.get() or ({}, {})
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = {} if ids is None else {"token_ids": ids}
        self.tokens.append(_ROUTING.set(({"domains": 0, **given, **routing}, outputs)))

    def after(self, *_: Any) -> None:
        if self.tokens:
            _ROUTING.reset(self.tokens.pop())


def follow_tokens(model: nn.Module) -> None:
    """Let every forward of `model` hand its `input_ids`, and domain 0, to routers that take them; `route` still has the last word."""
    hooks = _Tokens()
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, always_call=True)


class BiasedExperts(Experts):
    """Experts of one width with biases: into_bias (E, 2F) or (E, F), out_bias (E, D), from 0."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, kind: Kind, activation: str) -> None:
        super().__init__(d_model, d_ff, num_experts, kind, activation)
        self.into_bias = nn.Parameter(torch.zeros(num_experts, self.into.shape[1]))
        self.out_bias = nn.Parameter(torch.zeros(num_experts, d_model))

    def forward(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """(P, D) to (P, D); rows of no expert are 0."""
        dtype = compute_dtype(rows)
        offsets = plan.offsets[: self.num_experts + 1]
        gated, activation = settings(self.kind, self.activation)
        place = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
        somebodys = (expert < self.num_experts)[:, None]
        expert = expert.clamp(max=self.num_experts - 1)
        hidden = grouped_linear(rows.to(dtype), self.into.to(dtype), offsets) + self.into_bias.to(dtype)[expert]
        y = grouped_linear(hide(hidden, activation, gated), self.out.to(dtype), offsets)
        return (y + self.out_bias.to(dtype)[expert]) * somebodys


class PlainFFN(nn.Module):
    """The one expert that is left of a mixture, where the model's class has no FFN of its own. Named as in Phi-3 (with a gate) or Nemotron."""

    def __init__(self, d_model: int, d_ff: int, kind: Kind, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.kind, self.activation, self.d_model, self.d_ff, self.bias = kind, activation, d_model, d_ff, bias
        self.name = "gate_up_proj" if kind == "gate_up_down" else "up_proj"
        wide = 2 * d_ff if kind == "gate_up_down" else d_ff
        self.register_module(self.name, nn.Linear(d_model, wide, bias=bias))
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = hide(self.get_submodule(self.name)(x), self.activation, self.kind == "gate_up_down")
        y: Tensor = self.down_proj(hidden)
        return y


class MixtureFFN(MoELayer):
    """A `MoELayer` that a block of transformers can call: forward gives the output alone.

    Args:
        d_model, d_ff: D and F.
        router: of `moses.routers`.
        kind, activation: of the experts.
        bias: whether the experts have biases.
        dropout: of the output, in training.
        dense: an FFN beside the experts, whose output is added (the dense-plus-sparse connection); None for none.
        block: path of the block that it stands in, under which `route` reports.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        router: nn.Module,
        *,
        kind: Kind = "gate_up_down",
        activation: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        dense: nn.Module | None = None,
        block: str = "",
    ) -> None:
        num_experts: Any = router.num_experts
        super().__init__(d_model, d_ff, num_experts, router=router, experts=kind, activation=activation)
        if bias:
            self.experts = BiasedExperts(d_model, d_ff, num_experts, kind, activation)
        self.d_model, self.d_ff, self.dropout, self.block = d_model, d_ff, dropout, block
        self.register_module("dense", dense)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., D) to (..., D) of x's dtype; the router's keywords come from `route`.

        Raises:
            ModelError, DispatchError: as `MoELayer`.
        """
        context = _ROUTING.get()
        kind: Any = type(self.router)
        takes = _keywords(kind)
        routing = {} if context is None else {k: v for k, v in context[0].items() if k in takes}
        y, said = super().forward(x, **routing)
        if context is not None:
            context[1][self.block] = said
        if self.dropout and self.training:
            y = F.dropout(y, self.dropout)
        beside: Any = self.dense
        result: Tensor = y.to(x.dtype) if beside is None else beside(x) + y.to(x.dtype)
        return result
