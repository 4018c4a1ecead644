"""`grouped_ffn`: every expert's FFN over its own slice of the rows, and its gradients, in one op.

P rows in the order of a plan, E experts, D model width, F expert width, H = 2F with a gate and F without.

    moses::grouped_ffn(Tensor x, Tensor into, Tensor out, Tensor offsets, str activation, bool gated, bool transposed, bool keep)
            -> (Tensor y, Tensor hidden)
        x (P, D), into (E, H, D), out (E, D, F), or (E, D, H) and (E, F, D) where transposed -> y (P, D), hidden (P, H) = into · x, or
        (0, H) unless kept.
    moses::grouped_ffn_backward(Tensor grad, Tensor x, Tensor hidden, Tensor into, Tensor out, Tensor offsets, str activation, bool gated,
            bool transposed, bool to_x, bool to_weights) -> (Tensor x, Tensor into, Tensor out)
        grad (P, D) -> the gradients, of no elements where not asked for; exactly 0 for an expert without rows.

No gradient of a single expert is ever as large as the fused weight. The CPU's kernel is in `moses.ops.ffn_cpu`; other devices get the same from
`grouped_linear` and the activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DispatchError
from .activations import ACTIVATIONS
from .ffn_cpu import ffn_backward_cpu, ffn_cpu
from .grouped import check_grouped, grouped_linear, grouped_linear_reference
from .products import slices


def grouped_ffn(
    x: Tensor,
    into: Tensor,
    out: Tensor,
    offsets: Tensor,
    activation: str,
    *,
    gated: bool = True,
    transposed: bool = False,
) -> Tensor:
    """y_j = out_e · h for the expert e of row j; h = act(gate) ⊙ up of (gate, up) = into_e · x_j, or act(into_e · x_j) without a gate.

    Args:
        x: (P, D) floats.
        into: (E, 2F, D), gate over up, or (E, F, D) where not `gated`; the last two swapped where `transposed`. Of x's dtype, as `out`.
        out: (E, D, F); the last two swapped where `transposed`.
        offsets: (E + 1,) int64, as in a plan; rows from the last one on are nobody's.
        activation: of `ACTIVATIONS`.

    Returns:
        (P, D) of x's dtype; nobody's rows are 0.

    Raises:
        DispatchError: shapes, dtypes or the activation's name do not fit (`dispatch_arguments`).
    """
    check_grouped(x, into, offsets, transposed)
    experts, width, inner = out.shape if not transposed else (out.shape[0], out.shape[2], out.shape[1])
    hidden = into.shape[2 if transposed else 1]
    if (
        activation not in ACTIVATIONS
        or hidden != inner * (1 + gated)
        or experts != into.shape[0]
        or out.dtype != x.dtype
    ):
        raise DispatchError(
            f"into {tuple(into.shape)}, out {tuple(out.shape)} {out.dtype}, activation {activation!r} do not fit rows of {x.dtype}: give "
            f"{'(E, 2F, D)' if gated else '(E, F, D)'} and (E, {width}, F), of one dtype, and one of {', '.join(ACTIVATIONS)}",
            code="dispatch_arguments",
        )
    if x.device.type != "cpu":
        return _compose(x, into, out, offsets, activation, gated, transposed)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, into, out))
    y, _ = torch.ops.moses.grouped_ffn(x, into, out, offsets, activation, gated, transposed, keep)
    result: Tensor = y
    return result


def hide(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """(P, F) that `out` takes, from (P, H); differentiable."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return act(gate) * up


def _compose(
    x: Tensor, into: Tensor, out: Tensor, offsets: Tensor, activation: str, gated: bool, transposed: bool
) -> Tensor:
    hidden = hide(grouped_linear(x, into, offsets, transposed), activation, gated)
    return grouped_linear(hidden, out, offsets, transposed)


def grouped_ffn_reference(
    x: Tensor, into: Tensor, out: Tensor, offsets: Tensor, activation: str, gated: bool, transposed: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """`moses::grouped_ffn` in plain torch."""
    hidden = grouped_linear_reference(x, into, offsets, transposed)
    y = grouped_linear_reference(hide(hidden, activation, gated), out, offsets, transposed)
    return y, hidden if keep else hidden.new_empty(0, hidden.shape[1])


def grouped_ffn_backward_reference(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    into: Tensor,
    out: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    transposed: bool,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`moses::grouped_ffn_backward` by torch's own differentiation of the plain product of every expert."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, into, out)]
        limits, parts = offsets.tolist(), []
        for part in slices(limits, torch.float64):
            first, second = leaves[1][part.expert], leaves[2][part.expert]
            if not transposed:
                first, second = first.T, second.T
            parts.append(hide(leaves[0][part.start : part.end] @ first, activation, gated) @ second)
        y = torch.cat([*parts, x.new_zeros(x.shape[0] - limits[-1], x.shape[1])])
        found = torch.autograd.grad(y, leaves, grad) if parts else [torch.zeros_like(leaf) for leaf in leaves]
    wanted = zip(found, (to_x, to_weights, to_weights), strict=True)
    grad_x, grad_into, grad_out = (gradient if want else x.new_empty(0) for gradient, want in wanted)
    return grad_x, grad_into, grad_out


torch.library.define(
    "moses::grouped_ffn",
    "(Tensor x, Tensor into, Tensor out, Tensor offsets, str activation, bool gated, bool transposed, bool keep) -> (Tensor y, Tensor hidden)",
)
torch.library.define(
    "moses::grouped_ffn_backward",
    "(Tensor grad, Tensor x, Tensor hidden, Tensor into, Tensor out, Tensor offsets, str activation, bool gated, bool transposed, bool to_x, "
    "bool to_weights) -> (Tensor x, Tensor into, Tensor out)",
)
torch.library.impl("moses::grouped_ffn", "cpu")(ffn_cpu)
torch.library.impl("moses::grouped_ffn_backward", "cpu")(ffn_backward_cpu)


def _forward_fake(
    x: Tensor, into: Tensor, out: Tensor, offsets: Tensor, activation: str, gated: bool, transposed: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if keep else 0, into.shape[2 if transposed else 1])


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    into: Tensor,
    out: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    transposed: bool,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((x, to_x), (into, to_weights), (out, to_weights))
    grad_x, grad_into, grad_out = (x.new_empty(like.shape if want else (0,)) for like, want in wanted)
    return grad_x, grad_into, grad_out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, into, out, offsets, *ctx.settings, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], into, out, offsets)


def _gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return nothing
    x, hidden, into, out, offsets = ctx.saved_tensors
    to_x, to_into, to_out = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # a gradient of the gradient is asked for: that of the ops that this one is made of
        inputs = [tensor for tensor, needed in zip((x, into, out), (to_x, to_into, to_out), strict=True) if needed]
        y = _compose(x, into, out, offsets, *ctx.settings)
        found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
        return tuple(next(found) if needed else None for needed in (to_x, to_into, to_out)) + nothing[3:]
    gradients = torch.ops.moses.grouped_ffn_backward(
        grad, x, hidden, into, out, offsets, *ctx.settings, to_x, to_into or to_out
    )
    needs = (to_x, to_into, to_out)
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True)) + nothing[3:]


torch.library.register_fake("moses::grouped_ffn", _forward_fake)
torch.library.register_fake("moses::grouped_ffn_backward", _backward_fake)
torch.library.register_autograd("moses::grouped_ffn", _gradient, setup_context=_save)
