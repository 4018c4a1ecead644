"""`combine`: the weighted sum of a token's expert rows, and its gradients. Schemas and the order of sums are in `moses.ops`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _core
from ..buffers import buffer, empty
from ..cuda import kernels
from ..errors import DispatchError
from ..plan import DispatchPlan
from .rows import accumulator, check_rows, combine_cpu, name_of, register_vmap

LANES = 32  # partial sums of a dot product of two rows


def combine(y: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """Bring the experts' rows back: out[t] = Σ_s weights[t, s] · y[row of (t, s)], a dropped pair adds nothing.

    Args:
        y: (P, D) float32, bfloat16, float16 or float64; any strides. Empty rows are never read.
        plan: of P rows, on y's device.
        weights: (T, k), any float dtype; used in float32, float64 where y is.

    Returns:
        (T, D) of y's dtype, summed in slot order in float32 (float64 for float64) and rounded once.

    Raises:
        DispatchError: shapes, dtypes or devices do not fit (`dispatch_arguments`).
    """
    check_rows("y", y, plan, plan.num_rows)
    if weights.shape != (plan.num_tokens, plan.top_k) or not weights.is_floating_point() or weights.device != y.device:
        raise DispatchError(
            f"weights are {tuple(weights.shape)} {weights.dtype} on {weights.device}: the plan wants ({plan.num_tokens}, {plan.top_k}) of floats "
            f"on {y.device}",
            code="dispatch_arguments",
        )
    weights = weights.to(accumulator(y.dtype))
    result: Tensor = torch.ops.moses.combine(y, plan.order, plan.inverse, weights)
    return result


def combine_reference(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """`moses::combine` in plain torch."""
    rows = inverse.view(weights.shape)
    total = y.new_zeros(rows.shape[0], y.shape[1], dtype=weights.dtype)
    if y.shape[0]:
        for slot in range(rows.shape[1]):
            row = rows[:, slot]
            term = weights[:, slot, None] * y.index_select(0, row.clamp(min=0)).to(weights.dtype)
            total = torch.where((row >= 0)[:, None], total + term, total)
    return total.to(y.dtype)


def combine_backward_y_reference(grad: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """`moses::combine_backward_y` in plain torch."""
    if not grad.shape[0]:
        return grad.new_zeros(order.shape[0], grad.shape[1])
    pair = order.clamp(min=0)
    weight = weights.reshape(-1).index_select(0, pair)
    rows = weight[:, None] * grad.index_select(0, pair // weights.shape[1]).to(weights.dtype)
    return rows.masked_fill((order < 0)[:, None], 0).to(grad.dtype)


def combine_backward_weights_reference(grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::combine_backward_weights` in plain torch."""
    dtype = accumulator(y.dtype)
    if not y.shape[0] or not y.shape[1]:
        return grad.new_zeros(inverse.shape[0] // top_k, top_k, dtype=dtype)
    short = -y.shape[1] % LANES
    rows = y.index_select(0, inverse.clamp(min=0)).to(dtype).view(inverse.shape[0] // top_k, top_k, y.shape[1])
    products = F.pad(grad.to(dtype)[:, None] * rows, (0, short)).view(
        *rows.shape[:2], (y.shape[1] + short) // LANES, LANES
    )
    lanes = torch.zeros_like(products[:, :, 0])
    for part in range(products.shape[2]):
        lanes = lanes + products[:, :, part]
    while lanes.shape[2] > 1:
        half = lanes.shape[2] // 2
        lanes = lanes[:, :, :half] + lanes[:, :, half:]
    return lanes[:, :, 0].masked_fill(inverse.view(-1, top_k) < 0, 0)


torch.library.define("moses::combine", "(Tensor y, Tensor order, Tensor inverse, Tensor weights) -> Tensor")
torch.library.define(
    "moses::combine_backward_y", "(Tensor grad, Tensor order, Tensor inverse, Tensor weights) -> Tensor"
)
torch.library.define(
    "moses::combine_backward_weights", "(Tensor grad, Tensor y, Tensor order, Tensor inverse, int top_k) -> Tensor"
)
torch.library.impl("moses::combine", "CompositeExplicitAutograd")(combine_reference)
torch.library.impl("moses::combine_backward_y", "CompositeExplicitAutograd")(combine_backward_y_reference)
torch.library.impl("moses::combine_backward_weights", "CompositeExplicitAutograd")(combine_backward_weights_reference)


def _combine_cpu(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    if order.dtype != torch.int32:
        return combine_reference(y, order, inverse, weights)
    out = empty((weights.shape[0], y.shape[1]), y.dtype)
    combine_cpu(y, order, inverse, weights.shape[1], weights, out)
    return out


def _backward_y_cpu(grad: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    if order.dtype != torch.int32:
        return combine_backward_y_reference(grad, order, inverse, weights)
    out = empty((order.shape[0], grad.shape[1]), grad.dtype)
    _core.combine_backward_rows(
        name_of(grad.dtype),
        buffer(grad.contiguous()),
        grad.shape[1],
        buffer(order),
        buffer(inverse),
        weights.shape[1],
        buffer(weights.contiguous()),
        buffer(out),
        torch.get_num_threads(),
    )
    return out


def _backward_weights_cpu(grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    if order.dtype != torch.int32:
        return combine_backward_weights_reference(grad, y, order, inverse, top_k)
    out = empty((inverse.shape[0] // top_k, top_k), accumulator(y.dtype))
    _core.combine_backward_weights(
        name_of(y.dtype),
        buffer(grad.contiguous()),
        buffer(y.contiguous()),
        y.shape[1],
        buffer(order),
        buffer(inverse),
        top_k,
        buffer(out),
        torch.get_num_threads(),
    )
    return out


torch.library.impl("moses::combine", "cpu")(_combine_cpu)
torch.library.impl("moses::combine_backward_y", "cpu")(_backward_y_cpu)
torch.library.impl("moses::combine_backward_weights", "cpu")(_backward_weights_cpu)
for _name, _kernel, _reference in (
    ("combine", kernels.combine, combine_reference),
    ("combine_backward_y", kernels.combine_backward_y, combine_backward_y_reference),
    ("combine_backward_weights", kernels.combine_backward_weights, combine_backward_weights_reference),
):
    torch.library.impl(f"moses::{_name}", "cuda")(kernels.or_reference(_kernel, _reference))


def _combine_fake(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


def _backward_y_fake(grad: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    return grad.new_empty(order.shape[0], grad.shape[1])


def _backward_weights_fake(grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return grad.new_empty(inverse.shape[0] // top_k, top_k, dtype=accumulator(y.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, inverse, weights = inputs
    ctx.save_for_backward(rows, order, inverse, weights)


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, y, order, inverse, _ = inputs
    ctx.save_for_backward(grad, y, order, inverse)


def _combine_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    y, order, inverse, weights = ctx.saved_tensors
    ops, needs = torch.ops.moses, ctx.needs_input_grad
    to_y = ops.combine_backward_y(grad, order, inverse, weights) if needs[0] else None
    to_weights = ops.combine_backward_weights(grad, y, order, inverse, weights.shape[1]) if needs[3] else None
    return to_y, None, None, to_weights


def _backward_y_gradient(ctx: Any, upper: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    grad, order, inverse, weights = ctx.saved_tensors
    ops, needs = torch.ops.moses, ctx.needs_input_grad
    to_grad = ops.combine(upper, order, inverse, weights) if needs[0] else None
    to_weights = ops.combine_backward_weights(grad, upper, order, inverse, weights.shape[1]) if needs[3] else None
    return to_grad, None, None, to_weights


def _backward_weights_gradient(ctx: Any, upper: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    grad, y, order, inverse = ctx.saved_tensors
    ops, needs = torch.ops.moses, ctx.needs_input_grad
    to_grad = ops.combine(y, order, inverse, upper) if needs[0] else None
    to_y = ops.combine_backward_y(grad, order, inverse, upper) if needs[1] else None
    return to_grad, to_y, None, None, None


torch.library.register_fake("moses::combine", _combine_fake)
torch.library.register_fake("moses::combine_backward_y", _backward_y_fake)
torch.library.register_fake("moses::combine_backward_weights", _backward_weights_fake)
torch.library.register_autograd("moses::combine", _combine_gradient, setup_context=_save)
torch.library.register_autograd("moses::combine_backward_y", _backward_y_gradient, setup_context=_save)
torch.library.register_autograd("moses::combine_backward_weights", _backward_weights_gradient, setup_context=_save_both)
register_vmap("moses::combine", rows=(0,))
register_vmap("moses::combine_backward_y", rows=(0,))
register_vmap("moses::combine_backward_weights", rows=(0, 1), matrix=False)
