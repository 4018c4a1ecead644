"""Who gets a place where an expert takes only so many: the router's own capacity, in the order of GShard and Switch.

All first choices come before all second ones (GShard, Lepikhin et al., arXiv 2006.16668, algorithm 1, its two loops over tokens; Switch
has one choice), each in the order of the tokens. A layer's capacity goes by token, then slot, as its plan does: for one slot they agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import dispatch_plan


def first_come(expert_ids: Tensor, num_experts: int, capacity: int) -> Tensor:
    """(T, k) bool: whether the pair is among the first `capacity` of its expert by slot, then token.

    Args:
        expert_ids: (T, k) int64 in [0, E); -1, nobody, takes no room and is False.
        num_experts: E.
        capacity: at least 1.
    """
    ids = expert_ids.T.reshape(-1, 1)
    plan = dispatch_plan(torch.where(ids < 0, num_experts, ids), num_experts + 1, capacity)
    return (plan.inverse.view(expert_ids.shape[1], -1).T >= 0) & (expert_ids >= 0)


def first_come_reference(expert_ids: list[list[int]], num_experts: int, capacity: int) -> list[list[bool]]:
    """The same by the two loops."""
    taken = [0] * num_experts
    kept = [[False] * len(row) for row in expert_ids]
    for slot in range(len(expert_ids[0])):
        for token, row in enumerate(expert_ids):
            if row[slot] >= 0 and taken[row[slot]] < capacity:
                taken[row[slot]] += 1
                kept[token][slot] = True
    return kept
