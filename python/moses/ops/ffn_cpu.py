"""The CPU's kernel of `moses::grouped_ffn` and of its gradient: experts one after the other, in the order of their rows.

What lies between an expert's products is one block that stays in the cache, whatever the number of experts; only the hidden rows are kept for the
backward, which applies the activation again. Memory comes from the pool, sizes of products repeat (`moses.ops.products`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core
from ..buffers import buffer, empty
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

    def __init__(self, hidden: Tensor, inner: int, activation: str, gated: bool) -> None:
        self.hidden, self.inner, self.gated = hidden, inner, gated
        self.act = ACTIVATIONS[activation]
        form = self.act.sigmoid if gated and hidden.dtype != torch.float64 else None
        self.form, self.dtype, self.threads = form, name_of(hidden.dtype), torch.get_num_threads()
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


def sizes(parts: list[Slice]) -> tuple[int, int]:
    """The most rows that a product takes, and the most that it takes over an expert's own."""
    tallest = max((part.padded for part in parts), default=0)
    return tallest, max((part.padded - part.count for part in parts), default=0)


def ffn_cpu(
    x: Tensor, into: Tensor, out: Tensor, offsets: Tensor, activation: str, gated: bool, transposed: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """`moses::grouped_ffn` on the CPU."""
    first, second = (into, out) if transposed else (into.transpose(1, 2), out.transpose(1, 2))
    (rows, width), high, inner, dtype = x.shape, first.shape[2], second.shape[1], x.dtype
    limits = offsets.tolist()
    parts = list(slices(limits, dtype))
    tallest, slack = sizes(parts)
    y = empty((rows + slack, width), dtype)
    hidden = empty((rows + slack if keep else tallest, high), dtype)
    hide, inside = Hide(hidden, inner, activation, gated), Blocks(tallest, inner, dtype)
    copy = x.new_empty(tallest if slack else 0, width)
    maps = list(zip(first.unbind(0), second.unbind(0), strict=True))
    for part in parts:
        start = part.start if keep else 0
        lower, upper = maps[part.expert]
        torch.mm(window(x, part, copy), lower, out=hidden.narrow(0, start, part.padded))
        hide.forward(start, part.padded, inside)
        torch.mm(inside[part.padded], upper, out=y.narrow(0, part.start, part.padded))
    y[limits[-1] :].zero_()
    if keep:
        hidden[limits[-1] :].zero_()
    return y[:rows], hidden[:rows] if keep else x.new_empty(0, high)


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
    parts = list(slices(limits, dtype))
    tallest, slack = sizes(parts)
    grad_x = empty((rows + slack, width), dtype) if to_x else x.new_empty(0)
    grad_into, grad_out = (empty(weight.shape, dtype) if to_weights else x.new_empty(0) for weight in (into, out))
    maps = list(zip(first.unbind(0), second.unbind(0), strict=True))
    targets = list(zip(grad_into.unbind(0), grad_out.unbind(0), strict=True)) if to_weights else []
    hide = Hide(hidden, inner, activation, gated)
    grad_inside, inside, grad_high = (Blocks(tallest, wide, dtype) for wide in (inner, inner, high))
    copies = [x.new_empty(tallest if slack else 0, width) for _ in range(2)]
    for part in parts:
        count, padded, expert = part.count, part.padded, part.expert
        lower, upper = maps[expert]
        above, grad_h, h, grad_hidden = (
            zero_padded(grad, part, copies[0]),
            grad_inside[padded],
            inside[padded],
            grad_high[padded],
        )
        torch.mm(above, upper, out=grad_h)
        hide.backward(part.start, count, grad_inside, inside, grad_high)
        if padded > count:  # so that the products over rows add nothing there
            h[count:].zero_()
            grad_hidden[count:].zero_()
        if to_weights:
            grad_lower, grad_upper = targets[expert]
            below = zero_padded(x, part, copies[1])
            if transposed:
                torch.mm(h.T, above, out=grad_upper)
                torch.mm(below.T, grad_hidden, out=grad_lower)
            else:
                torch.mm(above.T, h, out=grad_upper)
                torch.mm(grad_hidden.T, below, out=grad_lower)
        if to_x:
            torch.mm(grad_hidden, lower, out=grad_x.narrow(0, part.start, padded))
    for expert in idle(limits) if to_weights else ():
        for target in targets[expert]:
            target.zero_()
    if to_x:
        grad_x[limits[-1] :].zero_()
        grad_x = grad_x[:rows]
    return grad_x, grad_into, grad_out
