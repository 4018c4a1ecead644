"""What the ops on rows share: the accumulator's dtype, the checks of the public functions, vmap.

A batch of rows under one plan is wider rows under that plan: vmap folds its dimension into D where only rows are batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..buffers import buffer
from ..errors import DispatchError
from ..plan import DispatchPlan

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rows(name: str, rows: Tensor, plan: DispatchPlan[Any], wanted: int) -> None:
    """Raise `DispatchError` (`dispatch_arguments`) unless `rows` is (wanted, D), of a dtype we sum, on the plan's device."""
    if not isinstance(plan.order, Tensor):
        problem = "the plan holds numpy arrays: make it from a tensor, dispatch_plan(torch.from_numpy(expert_ids), ...)"
    elif rows.dtype not in ROW_DTYPES:
        problem = f"{name} is {rows.dtype}: give float32, bfloat16, float16 or float64"
    elif rows.ndim != 2 or rows.shape[0] != wanted:
        problem = f"{name} has shape {tuple(rows.shape)}: the plan wants ({wanted}, width)"
    elif rows.device != plan.order.device:
        problem = f"{name} is on {rows.device}, the plan on {plan.order.device}: move one of them"
    else:
        return
    raise DispatchError(problem, code="dispatch_arguments")


def name_of(dtype: torch.dtype) -> str:
    """The core's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def combine_cpu(y: Tensor, order: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None, out: Tensor) -> None:
    """The core's sum of a token's rows into `out`; without weights each is 1."""
    _core.combine(
        name_of(y.dtype),
        buffer(y.contiguous()),
        y.shape[1],
        buffer(order),
        buffer(inverse),
        top_k,
        None if weights is None else buffer(weights.contiguous()),
        buffer(out),
        torch.get_num_threads(),
    )


def register_vmap(op: str, rows: tuple[int, ...], matrix: bool = True) -> None:
    """Register vmap for `op`, whose arguments number `rows` are matrices of rows; `matrix` says whether its result is one too."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        call: Callable[..., Tensor] = getattr(torch.ops, op.split("::")[0]).__getattr__(op.split("::")[1])
        batched = {place for place, dim in enumerate(in_dims) if dim is not None}
        if matrix and batched <= set(rows) and len(rows) == 1:
            (place,) = rows
            moved = args[place].movedim(in_dims[place], 1)
            wide = call(*args[:place], moved.reshape(moved.shape[0], -1), *args[place + 1 :])
            return wide.reshape(wide.shape[0], size, moved.shape[2]), 1
        parts = [
            [arg if dim is None else arg.select(dim, item) for arg, dim in zip(args, in_dims, strict=True)]
            for item in range(size)
        ]
        return torch.stack([call(*part) for part in parts]), 0

    torch.library.register_vmap(op, vmap)
