"""Gates: top-k, ties, precision, and that each task keeps its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moses.context import Group, TaskContext, groups_by_task
from moses.errors import ModelError
from moses.routers.task import TaskRouter, topk_gates


def reference_gates(logits, top_k):
    """Softmax, then the k largest by a Python sort that puts the lower id first among equals, then renormalised."""
    rows = []
    for row in logits.double().softmax(-1).tolist():
        best = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]
        total = sum(row[expert] for expert in best)
        rows.append([row[expert] / total if expert in best else 0.0 for expert in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


@given(data=st.data(), experts=st.integers(1, 9), tokens=st.integers(1, 12))
def test_gates_equal_the_reference_with_ties(data, experts, tokens):
    top_k = data.draw(st.integers(1, experts))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=experts * tokens, max_size=experts * tokens))
    logits = torch.tensor(values, dtype=torch.float64).reshape(tokens, experts)
    torch.testing.assert_close(topk_gates(logits, top_k), reference_gates(logits, top_k), rtol=1e-12, atol=1e-12)


def test_gates_are_differentiable():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_gates(x, 2), logits)


def router(dim=8, experts=4, top_k=2, router_dim=3):
    context = TaskContext()
    return TaskRouter("block", dim, experts, top_k, router_dim, seed=1, context=context), context


def test_half_precision_input_is_routed_in_float32():
    made, context = router(dim=64, experts=8)
    made.open(0)
    context.open_task, context.groups = 0, (Group(0),)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = made.gates(x)
    (wide,) = made.gates(x.float())
    assert found.dtype == torch.float32 and torch.equal(found, wide)
    (double,) = made.gates(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), wide, rtol=1e-4, atol=1e-5)


def test_tasks_keep_their_routers_through_growth_and_forgetting():
    made, context = router()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    found = {}
    for task in range(3):
        context.open_task = task
        made.open(task)
        with torch.no_grad():
            made.weight.normal_(generator=torch.Generator().manual_seed(task))
        context.groups = (Group(task),)
        found[task] = made.gates(x)[0].detach()
        made.close(task)
        context.open_task = None
        made.grow(made.num_experts + 1)
    made.forget(1)
    for task in (0, 2):
        context.groups = (Group(task),)
        assert torch.equal(made.gates(x)[0], found[task])
    assert found[2].shape[-1] == 6
    with pytest.raises(KeyError):
        made.task_weight(1)


def test_a_task_can_start_from_another_ones_router():
    made, context = router()
    context.open_task = 0
    made.open(0)
    start = made.weight.detach().clone()
    with torch.no_grad():
        made.weight.add_(1.0)
    made.close(0)
    context.open_task = 1
    made.open(1, like=0)
    assert torch.equal(made.weight.detach(), start + 1.0)
    made.open(1)
    assert not torch.equal(made.weight.detach(), start)
    made.open(0)
    assert torch.equal(made.weight.detach(), start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad):
    made, context = router()
    made.open(0)
    context.open_task, context.groups = 0, (Group(0),)
    x = torch.zeros(3, 8)
    x[1, 2] = bad
    with pytest.raises(ModelError, match="block"):
        made.gates(x)


def test_groups_of_rows():
    assert groups_by_task(torch.tensor([3, 3])) == (Group(3),)
    mixed = groups_by_task(torch.tensor([5, -1, 2, 5]))
    assert [(group.task, group.rows.tolist()) for group in mixed] == [(2, [2]), (5, [0, 3])]
    assert groups_by_task(torch.tensor([-1, -1])) == ()
