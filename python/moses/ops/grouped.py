"""`grouped_linear`: every expert's linear map over its own slice of the rows, and its gradients.

P rows in the order of a plan, E experts, D in, F out; rows `offsets[e] : offsets[e + 1]` are expert e's, rows from `offsets[E]` on nobody's.

    moses::grouped_linear(Tensor x, Tensor weight, Tensor offsets, bool transposed) -> Tensor
        x (P, D), weight (E, F, D), or (E, D, F) where transposed -> (P, F); nobody's rows are 0.
    moses::grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor
        left (P, F), right (P, D) -> (E, F, D): left_eᵀ · right_e, exactly 0 for an expert without rows.

The two are closed under differentiation. A weight is never indexed in a graph: the gradient of `weight[e]` is a whole (E, F, D) of zeros, so a
backward that indexes every expert is quadratic in E; here one product an expert writes its part of one result. On the CPU a loop of products
into preallocated slices is used for every E and dtype, since `torch.nn.functional.grouped_mm` is a loop as well, of products whose sizes do not
repeat (`benches/moe_ffn.py`); on CUDA `grouped_mm`, which does not wait for the offsets, where it takes the dtype.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..buffers import empty
from ..errors import DispatchError
from .products import slices, window, zero_padded


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False) -> Tensor:
    """y_j = W_e x_j for the expert e of row j.

    Args:
        x: (P, D) floats.
        weight: (E, F, D) of x's dtype; (E, D, F) where `transposed`.
        offsets: (E + 1,) int64, as in a plan; a plan of more experts than E leaves their rows to nobody.

    Returns:
        (P, F) of x's dtype.

    Raises:
        DispatchError: shapes or dtypes do not fit (`dispatch_arguments`).
    """
    check_grouped(x, weight, offsets, transposed)
    result: Tensor = torch.ops.moses.grouped_linear(x, weight, offsets, transposed)
    return result


def check_grouped(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> None:
    """Raise `DispatchError` (`dispatch_arguments`) unless `grouped_linear` takes these."""
    if (
        x.ndim != 2
        or weight.ndim != 3
        or weight.shape[1 if transposed else 2] != x.shape[1]
        or offsets.shape != (weight.shape[0] + 1,)
        or weight.dtype != x.dtype
    ):
        raise DispatchError(
            f"rows {tuple(x.shape)} {x.dtype}, weights {tuple(weight.shape)} {weight.dtype} and offsets {tuple(offsets.shape)} do not fit: "
            f"give (P, D), {'(E, D, F)' if transposed else '(E, F, D)'} and (E + 1,) of one dtype",
            code="dispatch_arguments",
        )


def grouped_linear_reference(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """`moses::grouped_linear`, a product an expert."""
    flat = weight if transposed else weight.transpose(1, 2)
    out = x.new_empty(x.shape[0], flat.shape[2])
    limits = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(limits)):
        if start < end:
            torch.mm(x[start:end], flat[expert], out=out[start:end])
    out[limits[-1] :].zero_()
    return out


def grouped_outer_reference(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """`moses::grouped_outer`, a product an expert."""
    out = left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])
    limits = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(limits)):
        if start < end:
            torch.mm(left[start:end].T, right[start:end], out=out[expert])
        else:
            out[expert].zero_()
    return out


def idle(limits: list[int]) -> list[int]:
    """The experts without rows."""
    return [expert for expert, (start, end) in enumerate(pairwise(limits)) if start == end]


def _linear_cpu(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    flat = weight if transposed else weight.transpose(1, 2)
    limits = offsets.tolist()
    parts = list(slices(limits, x.dtype))
    slack = max((part.padded - part.rows for part in parts), default=0)
    out = empty((x.shape[0] + slack, flat.shape[2]), x.dtype)
    copy = x.new_empty(max((part.padded for part in parts), default=0) if slack else 0, x.shape[1])
    for part in parts:
        torch.mm(window(x, part, copy), flat[part.expert], out=out[part.start : part.start + part.padded])
    out[limits[-1] :].zero_()
    return out[: x.shape[0]]


def _outer_cpu(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    limits = offsets.tolist()
    parts = list(slices(limits, left.dtype))
    out = empty((len(limits) - 1, left.shape[1], right.shape[1]), left.dtype)
    tallest = max((part.padded for part in parts), default=0)
    copies = [rows.new_empty(tallest, rows.shape[1]) for rows in (left, right)]
    for part in parts:
        rows = zero_padded(left, part, copies[0]), zero_padded(right, part, copies[1])
        torch.mm(rows[0].T, rows[1], out=out[part.expert])
    for expert in idle(limits):
        out[expert].zero_()
    return out


def _takes(*tensors: Tensor) -> bool:
    # of torch's grouped_mm: 16-byte strides and no float64
    return hasattr(torch.nn.functional, "grouped_mm") and all(
        tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and tensor.shape[-1] * tensor.element_size() % 16 == 0
        and tensor.stride(-1) == 1
        for tensor in tensors
    )


def _linear_cuda(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    if not _takes(x, weight):
        return grouped_linear_reference(x, weight, offsets, transposed)
    flat = weight if transposed else weight.transpose(1, 2)
    y = torch.nn.functional.grouped_mm(x, flat, offs=offsets[1:].int())
    rows = torch.arange(x.shape[0], device=x.device)
    return torch.where((rows < offsets[-1])[:, None], y, 0)


def _outer_cuda(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if not _takes(left, right):
        return grouped_outer_reference(left, right, offsets)
    y = torch.nn.functional.grouped_mm(left.T, right, offs=offsets[1:].int())
    return torch.where((offsets[1:] > offsets[:-1])[:, None, None], y, 0)


torch.library.define("moses::grouped_linear", "(Tensor x, Tensor weight, Tensor offsets, bool transposed) -> Tensor")
torch.library.define("moses::grouped_outer", "(Tensor left, Tensor right, Tensor offsets) -> Tensor")
torch.library.impl("moses::grouped_linear", "CompositeExplicitAutograd")(grouped_linear_reference)
torch.library.impl("moses::grouped_outer", "CompositeExplicitAutograd")(grouped_outer_reference)
torch.library.impl("moses::grouped_linear", "cpu")(_linear_cpu)
torch.library.impl("moses::grouped_outer", "cpu")(_outer_cpu)
torch.library.impl("moses::grouped_linear", "cuda")(_linear_cuda)
torch.library.impl("moses::grouped_outer", "cuda")(_outer_cuda)


def _linear_fake(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def _outer_fake(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, offsets)


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, offsets = ctx.saved_tensors
    ops, grad = torch.ops.moses, grad.contiguous()
    to_x = ops.grouped_linear(grad, weight, offsets, not ctx.transposed) if ctx.needs_input_grad[0] else None
    to_weight = None
    if ctx.needs_input_grad[1]:
        to_weight = ops.grouped_outer(x, grad, offsets) if ctx.transposed else ops.grouped_outer(grad, x, offsets)
    return to_x, to_weight, None, None


def _outer_gradient(ctx: Any, upper: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, offsets = ctx.saved_tensors
    ops, upper = torch.ops.moses, upper.contiguous()
    to_left = ops.grouped_linear(right, upper, offsets, False) if ctx.needs_input_grad[0] else None
    to_right = ops.grouped_linear(left, upper, offsets, True) if ctx.needs_input_grad[1] else None
    return to_left, to_right, None


torch.library.register_fake("moses::grouped_linear", _linear_fake)
torch.library.register_fake("moses::grouped_outer", _outer_fake)
torch.library.register_autograd("moses::grouped_linear", _linear_gradient, setup_context=_save_linear)
torch.library.register_autograd("moses::grouped_outer", _outer_gradient, setup_context=_save_outer)
