"""The ops of `moses.plan` and `moses.ops` by our kernels, on CUDA tensors; plain torch where they cannot be had."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import available, launch
from .names import PACKS, UNITS

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
THREADS = 256  # of a block
WARP = 32
FULL = 1 << 17  # threads that fill a device
LANES = 32
DIGIT_BITS = 8  # of an expert's id that one pass sorts by, at most
CHUNK_BITS = 8  # pairs that are ranked together, at most; a rank is a byte


def or_reference(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` where the device of the first argument has our kernels, else `reference`."""

    @functools.wraps(reference)
    def call(rows: Tensor, *arguments: Any) -> Any:
        return (kernel if available(rows.device) else reference)(rows, *arguments)

    return call


def plan(
    ids: Tensor, num_experts: int, capacity: int | None, pad: bool, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, offsets and counts of (T, k) integer `ids`, in `rows` rows of `dtype`."""
    keys, device = ids.reshape(-1).contiguous(), ids.device
    if keys.dtype not in (torch.int32, torch.int64):
        keys = keys.long()
    pairs = keys.shape[0]
    bits = max(1, (num_experts - 1).bit_length())
    passes = -(-bits // DIGIT_BITS)
    bits = -(-bits // passes)
    digits = 1 << bits
    chunk_bits = min(CHUNK_BITS, max(6, bits + 1))  # few entries of the table a pair, few pairs to compare with
    chunks = -(-pairs // (1 << chunk_bits))
    inverse = torch.empty(pairs, dtype=dtype, device=device)
    ranks = torch.empty(pairs, dtype=torch.uint8, device=device)
    table = scan = starts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    by_expert = None  # pairs in the order of the passes so far
    for number in range(passes if pairs else 0):
        cut = (number * bits, digits, chunk_bits, chunks)
        table = torch.zeros(digits, chunks, dtype=torch.int32, device=device)
        _each(f"plan_rank_{_name(keys)}", pairs, device, keys, pairs, num_experts, *cut, ranks, table)
        scan = table.view(-1).cumsum(0)
        if passes > 1:
            kernel = f"plan_move_{_name(keys)}_{_name(inverse)}"
            moved, order = torch.empty_like(keys, dtype=torch.int32), torch.empty_like(inverse)
            _each(kernel, pairs, device, keys, by_expert, pairs, *cut, ranks, table, scan, moved, order)
            keys, by_expert = moved, order
    if by_expert is not None:
        starts = torch.searchsorted(keys, torch.arange(num_experts + 1, dtype=torch.int32, device=device))
    elif pairs:
        starts = F.pad(scan.view(digits, chunks)[:num_experts, -1], (1, 0))
    counts = starts.diff()
    if capacity is None:
        order, offsets, limit = torch.empty_like(inverse) if by_expert is None else by_expert, starts, pairs
    else:
        counts = counts.clamp(max=capacity)
        width = torch.full_like(counts, capacity) if pad else counts
        order, offsets, limit = (
            torch.full((rows,), -1, dtype=dtype, device=device),
            F.pad(width.cumsum(0), (1, 0)),
            capacity,
        )
    end = (starts, offsets, limit, order, inverse)
    if by_expert is not None:
        _each(f"plan_rows_{_name(inverse)}", pairs, device, keys, by_expert, pairs, *end)
    elif pairs:
        kernel = f"plan_place_{_name(keys)}_{_name(inverse)}"
        _each(kernel, pairs, device, keys, pairs, digits, chunk_bits, chunks, ranks, table, scan, *end)
    return order, inverse, offsets, counts


def gather(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::gather`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(order.shape[0], x.shape[1])
    item = x.element_size()
    row, stride = x.shape[1] * item, x.stride(0) * item  # any, also 0 where rows are expanded
    unit = next(unit for unit in UNITS if row % unit == stride % unit == 0 and _aligned(unit, x, out))
    rows, pairs, units = order.shape[0], inverse.shape[0], row // unit
    kernel = f"gather_{unit}_{_name(order)}"
    _rows(kernel, rows, units, x.device, x, order, rows, pairs, units, stride // unit, top_k, out)
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
    rows, width = order.shape[0], grad.shape[1]
    out = grad.new_empty(rows, width)
    kernel, packs = _packed("scale", order, grad, out)
    arguments = (grad, order, weights, rows, inverse.shape[0], width, weights.shape[1], out)
    _rows(kernel, rows, packs, grad.device, *arguments)
    return out


def combine_backward_weights(grad: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """`moses::combine_backward_weights`."""
    grad, y, pairs = grad.contiguous(), y.contiguous(), inverse.shape[0]
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    lanes = torch.empty(pairs, LANES, dtype=dtype, device=y.device)
    out = torch.empty(pairs // top_k, top_k, dtype=dtype, device=y.device)
    kernel, packs = _packed("dot", inverse, grad, y)
    threads = pairs * LANES * packs // y.shape[1] if packs else pairs * LANES
    _each(kernel, threads, y.device, grad, y, inverse, pairs, y.shape[0], y.shape[1], top_k, lanes)
    _each(f"fold_{NAMES[dtype]}", pairs, y.device, lanes, pairs, out)
    return out


def _sum(y: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    y, tokens = y.contiguous(), inverse.shape[0] // top_k
    rows, width = y.shape
    out = y.new_empty(tokens, width)
    kernel, packs = _packed("combine", inverse, y, out)
    _rows(kernel, tokens, packs, y.device, y, inverse, weights, tokens, rows, width, top_k, out)
    return out


def _packed(kernel: str, indices: Tensor, *rows: Tensor) -> tuple[str, int]:
    # the kernel's name, and the packs of a row: of 16 bytes where every row begins at a multiple of them, else of one item
    name, width = NAMES[rows[0].dtype], rows[0].shape[1]
    items = PACKS[name] if width % PACKS[name] == 0 and _aligned(16, *rows) else 1
    return f"{kernel}_{name}_x{items}_{_name(indices)}", width // items


def _each(kernel: str, items: int, device: torch.device, *arguments: Tensor | int | None) -> None:
    # a thread an item
    if items:
        launch(kernel, -(-items // THREADS), (THREADS, 1), device, *arguments)


def _rows(kernel: str, rows: int, packs: int, device: torch.device, *arguments: Tensor | int | None) -> None:
    # a warp a row; fewer threads where rows are short, more where there are too few rows to fill the device
    if rows and packs:
        across = 1
        while across < packs and (across < WARP or (across < THREADS and rows * across < FULL)):
            across *= 2
        down = THREADS // across
        launch(kernel, -(-rows // down), (across, down), device, *arguments)


def _aligned(unit: int, *tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % unit == 0 for tensor in tensors)


def _name(indices: Tensor) -> str:
    return str(indices.dtype).removeprefix("torch.")
