"""The cut to a budget: never over it, the best first, ties to the lower unit, and the same as a plain loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moses.selection import top_units


def reference(scores, sizes, budget):
    entries = [(-value, tensor, unit) for tensor, part in enumerate(scores) for unit, value in enumerate(part)]
    kept = [[False] * len(part) for part in scores]
    for _, tensor, unit in sorted(entries):
        if sizes[tensor] <= budget:
            kept[tensor][unit] = True
            budget -= sizes[tensor]
    return kept


@given(
    scores=st.lists(st.lists(st.integers(0, 5).map(float), max_size=8), min_size=1, max_size=5),
    data=st.data(),
    budget=st.integers(0, 400),
    equal=st.booleans(),
)
def test_top_units_is_the_greedy_choice(scores, data, budget, equal):
    sizes = [data.draw(st.integers(1, 40)) for _ in scores]
    if equal:
        sizes = [sizes[0]] * len(sizes)
    found = top_units([torch.tensor(part) for part in scores], sizes, budget)
    assert [mask.tolist() for mask in found] == reference(scores, sizes, budget)
    assert sum(int(mask.sum()) * size for mask, size in zip(found, sizes, strict=True)) <= budget
