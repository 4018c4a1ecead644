"""Experts of a layer, over rows in the order of a plan.

T tokens, P rows, E experts, D model width, F expert width, R rank. Parameters are fused over experts, as transformers has them:

    gate_up_down   down · (act(gate · x) ⊙ up · x)    gate_up (E, 2F, D), down (E, D, F)     SwiGLU and its kin (Shazeer, arXiv 2002.05202)
    up_down        down · act(up · x)                 up (E, F, D), down (E, D, F)           the Transformer's FFN
    low_rank       B · (A · x)                        A (E, R, D), B (E, D, R), B from 0     LoRA's pair (Hu et al., arXiv 2106.09685)

Experts of different widths are `UnevenExperts`, with parameters of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError
from .ops import ACTIVATIONS, grouped_ffn, hide
from .plan import DispatchPlan

Kind = Literal["gate_up_down", "up_down", "low_rank"]


class Experts(nn.Module):
    """E experts of one width; `forward(rows, plan)` gives (P, D) in x's dtype, or autocast's."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, kind: Kind, activation: str) -> None:
        super().__init__()
        check(kind, activation)
        self.kind, self.activation, self.num_experts = kind, activation, num_experts
        wide = 2 * d_ff if kind == "gate_up_down" else d_ff
        self.into = nn.Parameter(torch.empty(num_experts, wide, d_model))
        self.out = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        start(self.into, self.out, kind)

    def forward(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """(P, D) to (P, D); rows of no expert are 0."""
        dtype = compute_dtype(rows)
        offsets = plan.offsets[: self.num_experts + 1]
        gated, activation = settings(self.kind, self.activation)
        into, out = self.into.to(dtype), self.out.to(dtype)
        return grouped_ffn(rows.to(dtype), into, out, offsets, activation, gated=gated)

    def extra_repr(self) -> str:
        """Of nn.Module."""
        return (
            f"{self.kind}, num_experts={self.num_experts}, into={tuple(self.into.shape)}, activation={self.activation}"
        )


class UnevenExperts(nn.Module):
    """Experts of the widths `d_ff[e]`; the number of each one's rows is read from the plan, which on CUDA waits for the device."""

    def __init__(self, d_model: int, d_ff: Sequence[int], kind: Kind, activation: str) -> None:
        super().__init__()
        check(kind, activation)
        self.kind, self.activation, self.num_experts = kind, activation, len(d_ff)
        factor = 2 if kind == "gate_up_down" else 1
        self.into = nn.ParameterList(nn.Parameter(torch.empty(factor * width, d_model)) for width in d_ff)
        self.out = nn.ParameterList(nn.Parameter(torch.empty(d_model, width)) for width in d_ff)
        for into, out in zip(self.into, self.out, strict=True):
            start(into, out, kind)

    def forward(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """(P, D) to (P, D); rows of no expert are 0."""
        dtype = compute_dtype(rows)
        gated, activation = settings(self.kind, self.activation)
        limits = plan.offsets[: self.num_experts + 1].tolist()
        parts = []
        for first, last, into, out in zip(limits, limits[1:], self.into, self.out, strict=False):
            hidden = F.linear(rows[first:last].to(dtype), into.to(dtype))
            parts.append(F.linear(hide(hidden, activation, gated), out.to(dtype)))
        parts.append(rows.new_zeros(rows.shape[0] - limits[-1], rows.shape[1], dtype=dtype))
        return torch.cat(parts)


def settings(kind: Kind, activation: str) -> tuple[bool, str]:
    """Whether experts of a kind have a gate, and the activation that they apply."""
    return kind == "gate_up_down", "linear" if kind == "low_rank" else activation


def check(kind: str, activation: str) -> None:
    """Raise `ConfigError` (`bad_setting`) for an unknown kind or activation."""
    if kind not in get_args(Kind):
        raise ConfigError(f"experts are {kind!r}; use one of {', '.join(get_args(Kind))}", code="bad_setting")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}", code="bad_setting")


@torch.no_grad()
def start(into: Tensor, out: Tensor, kind: Kind) -> None:
    """Normal with deviation fan-in^-1/2; a low-rank expert's second map from 0, so that it changes nothing at first."""
    into.normal_(std=into.shape[-1] ** -0.5)
    if kind == "low_rank":
        out.zero_()
    else:
        out.normal_(std=max(out.shape[-1], 1) ** -0.5)


def compute_dtype(rows: Tensor) -> torch.dtype:
    """What products are computed in: autocast's dtype where it is on, for autocast does not know these ops."""
    kind = rows.device.type
    if rows.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return rows.dtype
