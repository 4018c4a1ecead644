"""Which candidates a task keeps: one budget of bytes for which they compete, over the whole model or within each tensor.

Where the sub-experts of all layers compete for one budget, fewer bytes do the same (design 3.1). Equal scores go to the
lower layer, then to the lower unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .subexperts import Bank


def top_units(scores: list[Tensor], unit_bytes: list[int], budget: int) -> list[Tensor]:
    """The highest scores that fit in a budget.

    Args:
        scores: (units,) float32 a tensor; one entry a tensor that competes.
        unit_bytes: bytes a unit of each tensor.
        budget: bytes in all. A unit that no longer fits is passed over, and smaller ones after it may still fit.

    Returns:
        (units,) bool a tensor, on the CPU.
    """
    kept = [torch.zeros(len(part), dtype=torch.bool) for part in scores]
    flat = torch.cat([part.detach().float().cpu() for part in scores]) if scores else torch.zeros(0)
    sizes = (
        torch.cat([torch.full((len(part),), size) for part, size in zip(scores, unit_bytes, strict=True)])
        if scores
        else flat
    )
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    if len(set(unit_bytes)) == 1:
        chosen[order[: budget // unit_bytes[0]]] = True
    else:
        left = budget
        for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= left:
                chosen[index] = True
                left -= size
    start = 0
    for part in kept:
        part[:] = chosen[start : start + len(part)]
        start += len(part)
    return kept


def select_candidates(banks: list[Bank], new_budget: int, reused_budget: int, per_tensor: bool) -> None:
    """Keep, of every bank's open candidates, the top free ones within one budget and the top frozen ones within the other."""
    spaces = [(name, size) for bank in banks for name, _, size in bank.spaces]
    sizes = [size for _, size in spaces]
    fresh = [bank.importance() for bank in banks]
    reused = [bank.reuse_importance() for bank in banks]
    new = _select([scores for part in fresh for scores in part.values()], sizes, new_budget, per_tensor)
    old = _select([scores for part in reused for scores in part.values()], sizes, reused_budget, per_tensor)
    kept = iter(zip(new, old, strict=True))
    for bank in banks:
        masks = {name: next(kept) for name, _, _ in bank.spaces}
        bank.select({name: pair[0] for name, pair in masks.items()}, {name: pair[1] for name, pair in masks.items()})


def bank_bytes(bank: Bank) -> int:
    """Bytes of all values that the bank can hold."""
    return sum(units * size for _, units, size in bank.spaces) * bank.num_experts


def _select(scores: list[Tensor], sizes: list[int], budget: int, per_tensor: bool) -> list[Tensor]:
    if not per_tensor:
        return top_units(scores, sizes, budget)
    total = sum(len(part) * size for part, size in zip(scores, sizes, strict=True))
    shares = [budget * len(part) * size // max(total, 1) for part, size in zip(scores, sizes, strict=True)]
    return [top_units([part], [size], share)[0] for part, size, share in zip(scores, sizes, shares, strict=True)]
