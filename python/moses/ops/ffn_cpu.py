"""The CPU's kernel of `moses::grouped_ffn` and of its gradient: a thread's experts one after the other, in the order of their rows.

What lies between an expert's products is one block that stays in the cache, whatever the number of experts; only the hidden rows are kept for the
backward, which applies the activation again. Memory comes from the pool, sizes of products repeat (`moses.ops.products`), threads share the
experts out (`moses.ops.crew`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _core
from ..buffers import buffer, empty
from . import crew
from .activations import ACTIVATIONS
from .grouped import idle
from .products import Slice, slices, window, zero_padded
from .rows import name_of


class Blocks:
    """One block of memory for every expert in turn, cut to the rows that its products take."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.whole = empty((rows, width), dtype)
        self.memory = buffer(self.whole)
        self.cut: dict[int, Tensor] = {}

    def __getitem__(self, rows: int) -> Tensor:
        found = self.cut.get(rows)
        if found is None:
            found = self.cut[rows] = self.whole[:rows]
        return found


class Hide:
    """Between the products: h = act(gate) ⊙ up, or act, into memory that is there; one pass in the core for a gate that it has.

    Attributes:
        hidden: the hidden rows of all experts, or of one at a time.
    """

    def __init__(self, hidden: Tensor, inner: int, activation: str, gated: bool, threads: int) -> None:
        self.hidden, self.inner, self.gated = hidden, inner, gated
        self.act = ACTIVATIONS[activation]
        form = self.act.sigmoid if gated and hidden.dtype != torch.float64 else None
        self.form, self.dtype, self.threads = form, name_of(hidden.dtype), threads
        self.memory = buffer(hidden)

    def forward(self, start: int, count: int, h: Blocks) -> None:
        """h[count] from the hidden rows from `start` on."""
        if self.form is not None:
            _core.gate_forward(self.dtype, self.form, self.memory, start, count, self.inner, h.memory, self.threads)
            return
        rows = self.hidden[start : start + count]
        self.act.write(rows[:, : self.inner], h[count])
        if self.gated:
            h[count].mul_(rows[:, self.inner :])

    def backward(self, start: int, count: int, grad: Blocks, h: Blocks, grad_hidden: Blocks) -> None:
        """h[count] again, and grad_hidden[count] from grad[count], which may be overwritten."""
        if self.form is not None:
            _core.gate_backward(
                self.dtype,
                self.form,
                self.memory,
                start,
                count,
                self.inner,
                grad.memory,
                h.memory,
                grad_hidden.memory,
                self.threads,
            )
            return
        rows, above, inside, below = self.hidden[start : start + count], grad[count], h[count], grad_hidden[count]
        gate = rows[:, : self.inner]
        self.act.write(gate, inside)
        if not self.gated:
            self.act.write_gradient(above, gate, below)
            return
        up = rows[:, self.inner :]
        torch.mul(above, inside, out=below[:, self.inner :])
        inside.mul_(up)
        above.mul_(up)
        self.act.write_gradient(above, gate, below[:, : self.inner])


class Rows:
    """Rows of all experts that products write to. What a product writes behind an expert's own rows is overwritten by the next expert's; the
    last expert of a group, behind whom are another thread's rows or none, writes a copy first.
    """

    def __init__(self, rows: Tensor, group: Sequence[Slice], copy: Blocks) -> None:
        self.rows, self.end, self.copy = rows, group[-1].end, copy

    def write(self, part: Slice, left: Tensor, right: Tensor) -> None:
        """The expert's rows = left · right."""
        if part.start + part.padded <= self.end:
            torch.mm(left, right, out=self.rows.narrow(0, part.start, part.padded))
            return
        product = self.copy[part.padded]
        torch.mm(left, right, out=product)
        self.rows.narrow(0, part.start, part.rows).copy_(product[: part.rows])


def tallest(group: Sequence[Slice]) -> int:
    """The most rows that a product takes."""
    return max(part.padded for part in group)


def ffn_cpu(
    x: Tensor, into: Tensor, out: Tensor, offsets: Tensor, activation: str, gated: bool, transposed: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """`moses::grouped_ffn` on the CPU."""
    first, second = (into, out) if transposed else (into.transpose(1, 2), out.transpose(1, 2))
    (rows, width), high, inner, dtype = x.shape, first.shape[2], second.shape[1], x.dtype
    limits = offsets.tolist()
    y, kept = empty((rows, width), dtype), empty((rows if keep else 0, high), dtype)
    maps = list(zip(first.unbind(0), second.unbind(0), strict=True))

    def compute(group: Sequence[Slice], threads: int) -> None:
        height = tallest(group)
        inside, copy = Blocks(height, inner, dtype), Blocks(height, width, dtype)
        one = Blocks(height, high, dtype)
        hide = Hide(kept if keep else one.whole, inner, activation, gated, threads)
        hidden, result = Rows(kept, group, one), Rows(y, group, copy)
        for part in group:
            lower, upper = maps[part.expert]
            left = window(x, part, copy.whole)
            if keep:
                hidden.write(part, left, lower)
                hide.forward(part.start, part.rows, inside)
            else:
                torch.mm(left, lower, out=one[part.padded])
                hide.forward(0, part.rows, inside)
            result.write(part, inside[part.padded], upper)

    crew.run(compute, list(slices(limits, dtype)))
    y[limits[-1] :].zero_()
    kept[limits[-1] :].zero_()
    return y, kept


def ffn_backward_cpu(
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
    """`moses::grouped_ffn_backward` on the CPU."""
    first, second = (into.transpose(1, 2), out.transpose(1, 2)) if transposed else (into, out)
    (rows, width), high, inner, dtype = x.shape, first.shape[1], second.shape[2], x.dtype
    limits, grad, hidden = offsets.tolist(), grad.contiguous(), hidden.contiguous()
    grad_x = empty((rows, width), dtype) if to_x else x.new_empty(0)
    grad_into, grad_out = (empty(weight.shape, dtype) if to_weights else x.new_empty(0) for weight in (into, out))
    maps = list(zip(first.unbind(0), second.unbind(0), strict=True))
    targets = list(zip(grad_into.unbind(0), grad_out.unbind(0), strict=True)) if to_weights else []

    def compute(group: Sequence[Slice], threads: int) -> None:
        height = tallest(group)
        hide = Hide(hidden, inner, activation, gated, threads)
        grad_inside, inside, grad_high = (Blocks(height, wide, dtype) for wide in (inner, inner, high))
        above_copy, below_copy = (Blocks(height, width, dtype) for _ in range(2))
        result = Rows(grad_x, group, above_copy)
        for part in group:
            count, padded, expert = part.rows, part.padded, part.expert
            lower, upper = maps[expert]
            above = zero_padded(grad, part, above_copy.whole)
            h, grad_hidden = inside[padded], grad_high[padded]
            torch.mm(above, upper, out=grad_inside[padded])
            hide.backward(part.start, count, grad_inside, inside, grad_high)
            if padded > count:  # so that the products over rows add nothing there
                h[count:].zero_()
                grad_hidden[count:].zero_()
            if to_weights:
                grad_lower, grad_upper = targets[expert]
                below = zero_padded(x, part, below_copy.whole)
                if transposed:
                    torch.mm(h.T, above, out=grad_upper)
                    torch.mm(below.T, grad_hidden, out=grad_lower)
                else:
                    torch.mm(above.T, h, out=grad_upper)
                    torch.mm(grad_hidden.T, below, out=grad_lower)
            if to_x:
                result.write(part, grad_hidden, lower)

    crew.run(compute, list(slices(limits, dtype)))
    for expert in idle(limits) if to_weights else ():
        for target in targets[expert]:
            target.zero_()
    if to_x:
        grad_x[limits[-1] :].zero_()
    return grad_x, grad_into, grad_out
