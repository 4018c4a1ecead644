"""The k largest of a row, ties to the lower id: the op `moses::topk`, the same on every device.

`torch.topk` promises no order among equals, `max` promises the first. Cost, measured on the CPU with one thread (benches/topk.py):
up to 4 of a row are found by that many passes of `max`; for more, `torch.topk` finds k + 1, and only rows in which two of these are equal
are ranked again. Off the CPU nothing may depend on the data, so that no host waits: float32 is ranked by `torch.topk` of whole
numbers that hold the score and the id, and so have no ties; float64, which leaves no room for the id, by a stable sort.

Activation checkpointing: routes that are recomputed are the same, since the choice is deterministic and torch's generator is put back
(`preserve_rng_state`, the default); with `context_fn=moses.routers.save_routes` they are not recomputed at all but saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .. import plan as plan  # defines moses::dispatch_plan

_PASSES = 4  # up to here k passes of max cost less than one torch.topk and its repair


def stable_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order; equal ones in the order of their ids.

    Args:
        scores: (..., E) float32 or float64, no NaN; -inf only where at least k of the row are above it; 0 and -0 are equal.
        top_k: k, from 1 to E.

    Returns:
        Values and int64 ids, (..., k). Gradient flows through the values.
    """
    ids: Tensor = torch.ops.moses.topk(scores.detach(), top_k)
    return scores.gather(-1, ids), ids


def save_routes() -> Any:
    """`context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: keeps chosen experts and plans for the backward pass.

    They are 8 bytes a routed pair and as much for the plan; everything else of the function is recomputed as usual.
    """
    saved = [torch.ops.moses.topk.default, torch.ops.moses.dispatch_plan.default]
    return create_selective_checkpoint_contexts(saved)  # type: ignore[no-untyped-call]


def topk_reference(row: list[float], top_k: int) -> list[int]:
    """The ids of one row by Python's sort."""
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]


def _topk(scores: Tensor, top_k: int) -> Tensor:
    num_experts = scores.shape[-1]
    if not scores.numel():
        return scores.new_zeros(*scores.shape[:-1], top_k, dtype=torch.int64)
    if top_k <= _PASSES:
        return _by_passes(scores, top_k)
    if top_k == num_experts or scores.device.type != "cpu":
        return _ranked(scores, top_k)
    rows = scores.reshape(-1, num_experts)
    values, ids = rows.topk(top_k + 1, dim=-1)
    ids = ids[:, :top_k].contiguous()
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero()[:, 0]
    if tied.numel():
        ids[tied] = _ranked(rows[tied], top_k)
    return ids.view(*scores.shape[:-1], top_k)


def _by_passes(scores: Tensor, top_k: int) -> Tensor:
    best = scores.max(dim=-1, keepdim=True).indices
    if top_k == 1:
        return best
    found, left = [best], scores.clone()
    for _ in range(top_k - 1):
        left.scatter_(-1, best, float("-inf"))
        best = left.max(dim=-1, keepdim=True).indices
        found.append(best)
    return torch.cat(found, dim=-1)


def _ranked(scores: Tensor, top_k: int) -> Tensor:
    num_experts = scores.shape[-1]
    if scores.dtype != torch.float32 or top_k == num_experts:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # whole numbers in the order of the floats
    keys = (ordered << 32) + torch.arange(num_experts - 1, -1, -1, device=scores.device)
    return num_experts - 1 - (keys.topk(top_k, dim=-1).values & 0xFFFFFFFF)


def _fake(scores: Tensor, top_k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], top_k, dtype=torch.int64)


torch.library.define("moses::topk", "(Tensor scores, int top_k) -> Tensor")
torch.library.impl("moses::topk", "CompositeExplicitAutograd")(_topk)
torch.library.register_fake("moses::topk", _fake)
