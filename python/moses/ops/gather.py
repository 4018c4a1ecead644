"""`gather`: rows of tokens in the order of the plan, and its gradient, the sum of a token's rows. Schemas are in `moses.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..buffers import buffer, empty
from ..cuda import kernels
from ..plan import DispatchPlan
from .rows import accumulator, check_rows, combine_cpu, register_vmap


def gather(x: Tensor, plan: DispatchPlan) -> Tensor:
    """The rows that the experts see: row j is the token of pair `plan.order[j]`.

    Args:
        x: (T, D) float32, bfloat16, float16 or float64; any strides.
        plan: of T tokens, on x's device.

    Returns:
        (P, D) of x's dtype, bit for bit x's rows; zeros where the plan's row is empty. The gradient sums a token's rows in slot order, in
        float32 (float64 for float64), and rounds once.

    Raises:
        DispatchError: shapes, dtype or devices do not fit (`dispatch_arguments`).
    """
    check_rows("x", x, plan, plan.num_tokens)
    result: Tensor = torch.ops.moses.gather(x, plan.order, plan.inverse, plan.top_k)
    return result


def gather_reference(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::gather` in plain torch."""
    rows = x.index_select(0, order.clamp(min=0) // top_k) if x.shape[0] else x.new_zeros(order.shape[0], x.shape[1])
    return rows.masked_fill((order < 0)[:, None], 0)


def gather_backward_reference(grad: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::gather_backward` in plain torch."""
    rows = inverse.view(-1, top_k)
    total = grad.new_zeros(rows.shape[0], grad.shape[1], dtype=accumulator(grad.dtype))
    if grad.shape[0]:
        for slot in range(top_k):
            row = rows[:, slot]
            term = grad.index_select(0, row.clamp(min=0)).to(total.dtype)
            total = torch.where((row >= 0)[:, None], total + term, total)
    return total.to(grad.dtype)


torch.library.define("moses::gather", "(Tensor x, Tensor order, Tensor inverse, int top_k) -> Tensor")
torch.library.define("moses::gather_backward", "(Tensor grad, Tensor order, Tensor inverse, int top_k) -> Tensor")
torch.library.impl("moses::gather", "CompositeExplicitAutograd")(gather_reference)
torch.library.impl("moses::gather_backward", "CompositeExplicitAutograd")(gather_backward_reference)


def _gather_cpu(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    if order.dtype != torch.int32:
        return gather_reference(x, order, inverse, top_k)
    out = empty((order.shape[0], x.shape[1]), x.dtype)
    _core.gather(
        buffer(x.contiguous()),
        x.shape[1] * x.element_size(),
        buffer(order),
        buffer(inverse),
        top_k,
        buffer(out),
        torch.get_num_threads(),
    )
    return out


def _gather_backward_cpu(grad: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    if order.dtype != torch.int32:
        return gather_backward_reference(grad, order, inverse, top_k)
    out = empty((inverse.shape[0] // top_k, grad.shape[1]), grad.dtype)
    combine_cpu(grad, order, inverse, top_k, None, out)
    return out


torch.library.impl("moses::gather", "cpu")(_gather_cpu)
torch.library.impl("moses::gather_backward", "cpu")(_gather_backward_cpu)
torch.library.impl("moses::gather", "cuda")(kernels.or_reference(kernels.gather, gather_reference))
torch.library.impl("moses::gather_backward", "cuda")(
    kernels.or_reference(kernels.gather_backward, gather_backward_reference)
)


def _gather_fake(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _gather_backward_fake(grad: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return grad.new_empty(inverse.shape[0] // top_k, grad.shape[1])


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.moses.gather_backward(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


def _gather_backward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.moses.gather(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


torch.library.register_fake("moses::gather", _gather_fake)
torch.library.register_fake("moses::gather_backward", _gather_backward_fake)
torch.library.register_autograd("moses::gather", _gather_gradient, setup_context=_save_plan)
torch.library.register_autograd("moses::gather_backward", _gather_backward_gradient, setup_context=_save_plan)
register_vmap("moses::gather", rows=(0,))
register_vmap("moses::gather_backward", rows=(0,))
