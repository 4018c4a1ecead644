"""Which candidates a task keeps: one budget of bytes for which they compete, over the whole model or within each tensor.

Where the sub-experts of all layers compete for one budget, fewer bytes do the same (design 3.1). Equal scores go to the
lower layer, then to the lower unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .subexperts import Bank, ElementBank, RankBank


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


def cut_ranks(banks: list[RankBank], budget: int, per_tensor: bool) -> None:
    """Cut every bank's open candidates to `budget` bytes in all, or to its share of them each."""
    scores = [bank.importance()["components"] for bank in banks]
    sizes = [bank.spaces[0][2] for bank in banks]
    for bank, mask in zip(banks, _select(scores, sizes, budget, per_tensor), strict=True):
        bank.cut({"components": mask})


def select_elements(banks: list[ElementBank], new_budget: int, reused_budget: int, per_tensor: bool) -> None:
    """Set every bank's present mask: the top free weights within one budget, and the top frozen ones within the other."""
    names = [(bank, space) for bank in banks for space, _, _ in bank.spaces]
    fresh = [bank.importance() for bank in banks]
    reused = [bank.reuse_importance() for bank in banks]
    size = banks[0].spaces[0][2] if banks else 1
    sizes = [size] * len(names)
    new = _select(
        [part[space] for part, bank in zip(fresh, banks, strict=True) for space, _, _ in bank.spaces],
        sizes,
        new_budget,
        per_tensor,
    )
    old = _select(
        [part[space] for part, bank in zip(reused, banks, strict=True) for space, _, _ in bank.spaces],
        sizes,
        reused_budget,
        per_tensor,
    )
    masks: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for (bank, space), new_mask, old_mask in zip(names, new, old, strict=True):
        pair = masks.setdefault(id(bank), ({}, {}))
        pair[0][space], pair[1][space] = new_mask, old_mask
    for bank in banks:
        bank.select(*masks[id(bank)])


def bank_bytes(bank: Bank) -> int:
    """Bytes of all values that the bank can hold."""
    return sum(units * size for _, units, size in bank.spaces) * bank.num_experts


def _select(scores: list[Tensor], sizes: list[int], budget: int, per_tensor: bool) -> list[Tensor]:
    if not per_tensor:
        return top_units(scores, sizes, budget)
    total = sum(len(part) * size for part, size in zip(scores, sizes, strict=True))
    shares = [budget * len(part) * size // max(total, 1) for part, size in zip(scores, sizes, strict=True)]
    return [top_units([part], [size], share)[0] for part, size, share in zip(scores, sizes, shares, strict=True)]
