"""What the experts' products on the CPU share: sizes that repeat.

oneDNN, which multiplies 16-bit floats, builds a kernel for every shape that it has not seen (measured: 6 ms, as much as six products of 500 rows),
and an expert's number of rows is new at nearly every step. So a product takes some rows more than the expert has: what it writes behind the
expert's rows is overwritten by the next expert's product, which is why experts are always computed in the order of their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Slice(NamedTuple):
    """Rows `start : end` of an expert that has any; products take `padded` rows from `start` on."""

    expert: int
    start: int
    end: int
    padded: int

    @property
    def rows(self) -> int:
        """Rows of the expert."""
        return self.end - self.start


def slices(limits: list[int], dtype: torch.dtype) -> Iterator[Slice]:
    """The experts that have rows, in order."""
    for expert, (start, end) in enumerate(pairwise(limits)):
        if start < end:
            yield Slice(expert, start, end, padded_rows(end - start, dtype))


def padded_rows(count: int, dtype: torch.dtype) -> int:
    """Rows that a product of `count` rows takes: few sizes where kernels are built for each, at most a sixteenth more from 512 rows on."""
    if dtype not in (torch.bfloat16, torch.float16):
        return count
    if count <= 16:
        return 1 << (count - 1).bit_length()
    unit = 16 if count <= 128 else max(32, 1 << (count.bit_length() - 5))
    return -(-count // unit) * unit


def window(rows: Tensor, part: Slice, scratch: Tensor) -> Tensor:
    """(padded, D): the expert's rows and some behind them, whose values are anything; a copy in `scratch` where none are left."""
    if part.start + part.padded <= rows.shape[0]:
        return rows.narrow(0, part.start, part.padded)
    return zero_padded(rows, part, scratch)


def zero_padded(rows: Tensor, part: Slice, scratch: Tensor) -> Tensor:
    """(padded, D): the expert's rows and zeros behind them, copied to `scratch` where it takes any."""
    if part.padded == part.rows:
        return rows.narrow(0, part.start, part.rows)
    copy = scratch[: part.padded]
    copy[: part.rows].copy_(rows[part.start : part.end])
    copy[part.rows :].zero_()
    return copy
