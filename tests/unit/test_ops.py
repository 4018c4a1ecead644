"""Gather and combine: against plain indexing, their gradients, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch.library import opcheck

import moses
from moses.errors import DispatchError
from moses.ops.combine import LANES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def case(tokens=7, top_k=3, experts=5, width=6, dtype=torch.float64, capacity=None, pad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    plan = moses.dispatch_plan(ids, experts, capacity, pad=pad)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(plan.num_rows, width, generator=generator, dtype=torch.float64).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return plan, x, y, torch.rand(tokens, top_k, generator=generator, dtype=accumulator)


CAPACITIES = [(None, False), (3, False), (6, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capacity", "pad"), CAPACITIES)
def test_gather_and_combine_equal_plain_indexing(dtype, capacity, pad):
    plan, x, y, weights = case(dtype=dtype, capacity=capacity, pad=pad)
    rows = moses.ops.gather(x, plan)
    out = moses.ops.combine(y, plan, weights)
    assert rows.dtype == out.dtype == dtype
    for row, pair in enumerate(plan.order.tolist()):
        assert torch.equal(rows[row], x[pair // 3] if pair >= 0 else torch.zeros_like(x[0]))
    for token in range(7):
        total = torch.zeros(6, dtype=weights.dtype)
        for slot in range(3):
            row = int(plan.inverse[token * 3 + slot])
            if row >= 0:
                total = total + weights[token, slot] * y[row].to(weights.dtype)
        assert torch.equal(out[token], total.to(dtype))


def test_empty_rows_are_never_read_and_nan_passes_a_copy():
    plan, x, y, weights = case(capacity=6, pad=True)
    x[2] = float("nan")
    y[plan.order < 0] = float("nan")
    assert moses.ops.gather(x, plan).isnan().any(1).sum() == (plan.order // 3 == 2).sum()
    assert moses.ops.combine(y, plan, weights).isfinite().all()
    zeros = torch.zeros_like(plan.order)
    grad = torch.full_like(y, float("nan")).where((plan.order < 0)[:, None], zeros[:, None].double())
    assert torch.equal(torch.ops.moses.gather_backward(grad, plan.order, plan.inverse, 3), torch.zeros_like(x))


@pytest.mark.parametrize(("capacity", "pad"), CAPACITIES)
def test_gradients_and_their_gradients(capacity, pad):
    plan, x, y, weights = case(capacity=capacity, pad=pad, width=3)
    for tensor in (x, y, weights):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moses.ops.gather(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda y, weights: moses.ops.combine(y, plan, weights), (y, weights))
    assert torch.autograd.gradgradcheck(lambda x: moses.ops.gather(x, plan), (x,))
    assert torch.autograd.gradgradcheck(lambda y, weights: moses.ops.combine(y, plan, weights), (y, weights))
    grad = torch.randn_like(x).requires_grad_()
    dot = torch.ops.moses.combine_backward_weights
    assert torch.autograd.gradcheck(lambda grad, y: dot(grad, y, plan.order, plan.inverse, 3), (grad, y))


# opcheck itself looks at the gradient of a tensor that is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("capacity", "pad"), [(None, False), (6, True)])
def test_opcheck(capacity, pad):
    ops = torch.ops.moses
    plan, x, y, weights = case(capacity=capacity, pad=pad, dtype=torch.float32)
    ids = torch.randint(0, 5, (7, 3), generator=torch.Generator().manual_seed(0))
    opcheck(ops.dispatch_plan.default, (ids, 5, capacity, pad))
    for tensor in (x, y, weights):
        tensor.requires_grad_()
    index = (plan.order, plan.inverse)
    opcheck(ops.gather.default, (x, *index, 3))
    opcheck(ops.gather_backward.default, (y, *index, 3))
    opcheck(ops.combine.default, (y, *index, weights))
    opcheck(ops.combine_backward_y.default, (x, *index, weights))
    opcheck(ops.combine_backward_weights.default, (x, y, *index, 3))


def test_weights_gradient_sums_in_lanes():
    plan, x, y, _ = case(dtype=torch.float32, width=LANES * 2 + 5)
    ours = torch.ops.moses.combine_backward_weights(x, y, plan.order, plan.inverse, 3)
    for pair in range(21):
        lanes = torch.zeros(LANES)
        for d in range(x.shape[1]):
            lanes[d % LANES] += x[pair // 3, d] * y[plan.inverse[pair], d]
        for half in (16, 8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half:]
        assert ours.flatten()[pair] == lanes[0]


def test_vmap_equals_a_loop():
    plan, _, _, weights = case(dtype=torch.float32)
    xs, ys = torch.randn(4, 7, 6), torch.randn(21, 4, 6)
    gathered = torch.vmap(lambda x: moses.ops.gather(x, plan))(xs)
    assert torch.equal(gathered, torch.stack([moses.ops.gather(x, plan) for x in xs]))
    combined = torch.vmap(lambda y: moses.ops.combine(y, plan, weights), in_dims=1)(ys)
    assert torch.equal(combined, torch.stack([moses.ops.combine(y, plan, weights) for y in ys.unbind(1)]))
    many = torch.rand(4, 7, 3)
    combined = torch.vmap(lambda y, weights: moses.ops.combine(y, plan, weights), in_dims=(1, 0))(ys, many)
    wanted = [moses.ops.combine(y, plan, weights) for y, weights in zip(ys.unbind(1), many, strict=True)]
    assert torch.equal(combined, torch.stack(wanted))


def test_compile_has_no_graph_break_forward_and_backward():
    def step(x, scores):
        weights, ids = scores.softmax(-1).topk(2)
        plan = moses.dispatch_plan(ids, 4)
        return moses.ops.combine(moses.ops.gather(x, plan) * 2, plan, weights).square().sum()

    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(9, 8, generator=generator), torch.randn(9, 4, generator=generator)
    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        call(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_checkpointing_recomputes_over_the_saved_plan():
    plan, x, _, weights = case(dtype=torch.float32)
    grads = []
    for checkpoint in (False, True):
        leaf = x.clone().requires_grad_()

        def layer(x):
            return moses.ops.combine(moses.ops.gather(x, plan).tanh(), plan, weights)

        run = torch.utils.checkpoint.checkpoint if checkpoint else lambda layer, x, use_reentrant: layer(x)
        run(layer, leaf, use_reentrant=False).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_autocast_changes_nothing():
    plan, _, y, weights = case(dtype=torch.bfloat16)
    wanted = moses.ops.combine(y, plan, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moses.ops.combine(y, plan, weights), wanted)
        halves = moses.ops.combine(y, plan, weights.bfloat16())
    assert torch.equal(halves, moses.ops.combine(y, plan, weights.bfloat16().float()))


def test_no_tokens_and_no_width():
    plan, x, y, weights = case(tokens=0)
    assert moses.ops.gather(x, plan).shape == (0, 6)
    assert moses.ops.combine(y, plan, weights).shape == (0, 6)
    plan = moses.dispatch_plan(torch.zeros(0, 1, dtype=torch.int64), 2, capacity=3, pad=True)
    assert torch.equal(moses.ops.gather(torch.ones(0, 4), plan), torch.zeros(6, 4))
    plan, x, y, weights = case(width=0)
    assert moses.ops.combine(moses.ops.gather(x, plan), plan, weights).shape == (7, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, plan, weights: moses.ops.gather(x[:-1], plan), r"x has shape \(6, 6\)"),
        (lambda x, y, plan, weights: moses.ops.gather(x[0], plan), "x has shape"),
        (lambda x, y, plan, weights: moses.ops.gather(x.long(), plan), "x is torch.int64"),
        (lambda x, y, plan, weights: moses.ops.gather(x.to("meta"), plan), "x is on meta"),
        (lambda x, y, plan, weights: moses.ops.combine(y[1:], plan, weights), "y has shape"),
        (lambda x, y, plan, weights: moses.ops.combine(y, plan, weights[:, :2]), "weights are"),
        (lambda x, y, plan, weights: moses.ops.combine(y, plan, weights.long()), "weights are"),
    ],
)
def test_what_does_not_fit_says_so(change, message):
    plan, x, y, weights = case()
    with pytest.raises(DispatchError, match=message) as caught:
        change(x, y, plan, weights)
    assert caught.value.code == "dispatch_arguments"


def test_a_numpy_plan_is_for_numpy():
    plan = moses.dispatch_plan(torch.zeros(3, 1, dtype=torch.int64).numpy(), 2)
    with pytest.raises(DispatchError, match="the plan holds numpy arrays"):
        moses.ops.gather(torch.ones(3, 4), plan)
