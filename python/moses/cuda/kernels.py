"""The ops of `moses.plan` and `moses.ops` by our kernels, on CUDA tensors; plain torch where they cannot be had, with one warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .launch import THREADS, launch

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LANES = 32
_warned = False


def or_reference(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, or `reference` from the first time on that kernels turn out not to be there."""

    @functools.wraps(reference)
    def call(*arguments: Any) -> Any:
        global _warned
        if not _warned:
            try:
                return kernel(*arguments)
            except ModelError as error:
                _warned = True
                warnings.warn(
                    f"moses runs on plain torch instead of its CUDA kernels: {error}", RuntimeWarning, stacklevel=2
                )
        return reference(*arguments)

    return call


def plan(
    ids: Tensor, num_experts: int, capacity: int | None, pad: bool, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, offsets and counts of (T, k) int64 `ids`, in `rows` rows of `dtype`."""
    flat, device = ids.reshape(-1).contiguous(), ids.device
    pairs = flat.shape[0]
    chunk = max(256, num_experts)
    chunks = -(-pairs // chunk)
    counted = torch.zeros(num_experts, max(chunks, 1), dtype=torch.int32, device=device)
    blocks = -(-chunks // THREADS)
    launch("dispatch", "plan_count", blocks, device, flat, pairs, num_experts, chunk, chunks, counted)
    ranks = counted.view(-1).cumsum(0) - counted.view(-1)
    counts = counted.sum(1)
    starts = F.pad(counts.cumsum(0), (1, 0))[:-1].contiguous()
    taken = counts if capacity is None else counts.clamp(max=capacity)
    width = torch.full_like(taken, capacity or 0) if pad else taken
    offsets = F.pad(width.cumsum(0), (1, 0))
    order = (
        torch.full((rows,), -1, dtype=dtype, device=device)
        if capacity
        else torch.empty(rows, dtype=dtype, device=device)
    )
    inverse = torch.empty(pairs, dtype=dtype, device=device)
    limit = pairs if capacity is None else capacity
    launch(
        "dispatch",
        f"plan_place_{_index(order)}",
        blocks,
        device,
        flat,
        pairs,
        chunk,
        chunks,
        ranks,
        starts,
        offsets,
        limit,
        order,
        inverse,
    )
    return order, inverse, offsets, taken


def gather(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::gather`."""
    x, out = x.contiguous(), x.new_empty(order.shape[0], x.shape[1])
    row_bytes = x.shape[1] * x.element_size()
    unit = next(unit for unit in (16, 4, 2) if row_bytes % unit == 0 and _aligned(unit, x, out))
    work = order.shape[0] if row_bytes else 0
    launch(
        "combine",
        f"gather_{unit}_{_index(order)}",
        work,
        x.device,
        x,
        order,
        order.shape[0],
        row_bytes // unit,
        top_k,
        out,
    )
    return out


def gather_backward(grad: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::gather_backward`."""
    return _sum(grad, inverse, None, top_k)


def combine(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """`moses::combine`."""
    return _sum(y, inverse, weights.contiguous(), weights.shape[1])


def combine_backward_y(grad: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """`moses::combine_backward_y`."""
    grad, weights = grad.contiguous(), weights.contiguous()
    out = grad.new_empty(order.shape[0], grad.shape[1])
    kernel = f"scale_{NAMES[grad.dtype]}_x{_pack(grad, out)}_{_index(order)}"
    work = order.shape[0] if grad.shape[1] else 0
    launch(
        "combine", kernel, work, grad.device, grad, order, weights, order.shape[0], grad.shape[1], weights.shape[1], out
    )
    return out


def combine_backward_weights(grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::combine_backward_weights`."""
    grad, y, pairs = grad.contiguous(), y.contiguous(), inverse.shape[0]
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    lanes = torch.empty(pairs, LANES, dtype=dtype, device=y.device)
    work = -(-pairs * LANES // THREADS)
    launch(
        "combine",
        f"lanes_{NAMES[y.dtype]}_{_index(inverse)}",
        work,
        y.device,
        grad,
        y,
        inverse,
        pairs,
        y.shape[1],
        top_k,
        lanes,
    )
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.view(-1, top_k)


def _sum(y: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    y, tokens = y.contiguous(), inverse.shape[0] // top_k
    out = y.new_empty(tokens, y.shape[1])
    kernel = f"combine_{NAMES[y.dtype]}_x{_pack(y, out)}_{_index(inverse)}"
    launch(
        "combine", kernel, tokens if y.shape[1] else 0, y.device, y, inverse, weights, tokens, y.shape[1], top_k, out
    )
    return out


def _aligned(unit: int, *tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % unit == 0 for tensor in tensors)


def _pack(*rows: Tensor) -> int:
    # items of 16 bytes where every row begins at one
    items = 16 // rows[0].element_size()
    return items if rows[0].shape[1] % items == 0 and _aligned(16, *rows) else 1


def _index(indices: Tensor) -> str:
    return "int32" if indices.dtype == torch.int32 else "int64"
