"""The core's plan and row kernels: the reference's bits for any number of threads, memory that is never lent twice, and bad calls."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import moses
from moses import _core
from moses.buffers import SMALL, buffer, empty
from moses.ops.combine import combine_backward_weights_reference, combine_backward_y_reference, combine_reference
from moses.ops.gather import gather_backward_reference, gather_reference
from moses.plan import dispatch_plan_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_a_thousand_batches_have_the_references_plan():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(1000):
        experts, tokens, top_k = draw(1, 20), draw(0, 30), draw(1, 5)
        ids = torch.randint(experts, (tokens, min(top_k, experts)), generator=generator)
        if draw(0, 2):
            ids = ids.clamp(max=draw(0, experts))  # duplicates, and experts without a token
        capacity = draw(1, 6) if draw(0, 2) else None
        pad = capacity is not None and bool(draw(0, 2))
        plan = moses.dispatch_plan(ids, experts, capacity, pad=pad)
        wanted = dispatch_plan_reference(ids, experts, capacity, pad)
        for found, other in zip((plan.order, plan.inverse, plan.offsets, plan.counts), wanted, strict=True):
            assert same(found, other)


@pytest.mark.parametrize("experts", [3, 300, 5000])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.int16])
def test_large_plans_do_not_depend_on_threads(experts, id_dtype, threads):
    ids = torch.randint(experts, (50_000, 2), generator=torch.Generator().manual_seed(1)).to(id_dtype)
    wanted = dispatch_plan_reference(ids, experts, None, False)
    for count in (1, 2, 4, 16):
        threads(count)
        plan = moses.dispatch_plan(ids, experts)
        assert all(map(same, (plan.order, plan.inverse, plan.offsets, plan.counts), wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [None, 200])
def test_rows_have_the_references_bits_for_any_number_of_threads(dtype, capacity, threads):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(7, (600, 3), generator=generator)
    plan = moses.dispatch_plan(ids, 7, capacity)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = (torch.randn(600, 131, generator=generator).to(dtype) for _ in range(2))
    y = torch.randn(plan.num_rows, 131, generator=generator).to(dtype)
    weights = torch.randn(600, 3, generator=generator).to(acc)
    calls = [
        (torch.ops.moses.gather, gather_reference, (x, plan.order, plan.inverse, 3)),
        (torch.ops.moses.gather_backward, gather_backward_reference, (y, plan.order, plan.inverse, 3)),
        (torch.ops.moses.combine, combine_reference, (y, plan.order, plan.inverse, weights)),
        (torch.ops.moses.combine_backward_y, combine_backward_y_reference, (grad, plan.order, plan.inverse, weights)),
        (
            torch.ops.moses.combine_backward_weights,
            combine_backward_weights_reference,
            (grad, y, plan.order, plan.inverse, 3),
        ),
    ]
    for op, reference, arguments in calls:
        wanted = reference(*arguments)
        for count in (1, 2, 4, 16):
            threads(count)
            assert same(op(*arguments), wanted), (op, count)


def test_inputs_of_any_strides_are_read():
    ids = torch.randint(4, (2, 40), generator=torch.Generator().manual_seed(3)).T
    x = torch.randn(12, 40).T
    plan = moses.dispatch_plan(ids, 4)
    assert same(plan.order, moses.dispatch_plan(ids.contiguous(), 4).order)
    assert torch.equal(moses.ops.gather(x, plan), x[plan.order.long() // 2])
    one = moses.dispatch_plan(torch.tensor([[1]]).expand(9, 2), 4)
    assert one.counts.tolist() == [0, 18, 0, 0]
    assert torch.equal(moses.ops.gather(torch.ones(1, 5).expand(9, 5), one), torch.ones(18, 5))


def test_memory_is_used_again_and_never_while_anything_refers_to_it():
    _core.pool_clear()
    first = empty((SMALL,), torch.uint8)
    address = first.data_ptr()
    first.fill_(7)
    tail = first[10:20]
    del first
    gc.collect()
    second = empty((SMALL,), torch.uint8)
    assert second.data_ptr() != address and _core.pool_bytes() == 0
    assert (tail == 7).all()
    del tail
    gc.collect()
    assert _core.pool_bytes() >= SMALL
    third = empty((SMALL,), torch.uint8)
    assert third.data_ptr() == address
    assert third.data_ptr() % 64 == 0
    del second, third
    gc.collect()
    assert _core.pool_clear() >= 2 * SMALL and _core.pool_bytes() == 0


def test_results_that_live_side_by_side_do_not_share_memory():
    x = torch.randn(2000, 64)
    plans = [
        moses.dispatch_plan(torch.randint(8, (2000, 2), generator=torch.Generator().manual_seed(s)), 8)
        for s in range(4)
    ]
    rows = [moses.ops.gather(x, plan) for plan in plans]
    for plan, found in zip(plans, rows, strict=True):
        assert torch.equal(found, x[plan.order.long() // 2])


def call_plan(**changes):
    arguments = {
        "expert_ids": np.zeros(4, np.int64),
        "top_k": 2,
        "num_experts": 3,
        "capacity": None,
        "pad": False,
        "order": np.zeros(4, np.int32),
        "inverse": np.zeros(4, np.int32),
        "offsets": np.zeros(4, np.int64),
        "counts": np.zeros(3, np.int64),
        "threads": 1,
    }
    _core.dispatch_plan(*(arguments | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 3},
        {"top_k": 0},
        {"num_experts": 0},
        {"num_experts": 2},
        {"num_experts": 1 << 40},
        {"capacity": 0},
        {"pad": True},
        {"order": np.zeros(3, np.int32)},
        {"order": np.zeros(5, np.int32)},
        {"inverse": np.zeros(4, np.int64)},
        {"counts": np.zeros(3, np.int32)},
        {"expert_ids": np.full(4, 3)},
        {"expert_ids": np.full(4, -1)},
        {"expert_ids": np.zeros(0, np.int64)},
    ],
)
def test_a_bad_call_of_the_core_is_a_typed_error(changes):
    with pytest.raises(moses.MosesError) as caught:
        call_plan(**changes)
    assert caught.value.code in ("dispatch_arguments", "expert_id_range")


def test_outputs_must_be_writable_and_contiguous():
    frozen = np.zeros(4, np.int32)
    frozen.flags.writeable = False
    for bad in (frozen, np.zeros(8, np.int32)[::2]):
        with pytest.raises(BufferError):
            call_plan(order=bad)
    call_plan(threads=0)
    call_plan(threads=1 << 60)


def test_a_plan_that_was_not_made_by_us_is_an_error_not_a_read_elsewhere():
    x = np.zeros((2, 4), np.float32)
    for index in (2, -2, 2**31 - 1):
        order = np.array([0, index], np.int32)
        with pytest.raises(moses.MosesError) as caught:
            _core.gather(x, 16, order, np.zeros(2, np.int32), 1, np.zeros((2, 4), np.float32), 1)
        assert caught.value.code == "plan_index"
        with pytest.raises(moses.MosesError) as caught:
            _core.combine("float32", x, 4, np.zeros(2, np.int32), order, 1, None, np.zeros((2, 4), np.float32), 1)
        assert caught.value.code == "plan_index"
    with pytest.raises(moses.MosesError, match="int8"):
        _core.combine("int8", x, 4, np.zeros(2, np.int32), np.zeros(2, np.int32), 1, None, x.copy(), 1)
    with pytest.raises(moses.MosesError):
        _core.gather(x, 1 << 62, np.zeros(2, np.int32), np.zeros(2, np.int32), 1, x.copy(), 1)


def test_a_block_of_no_size_and_one_too_large():
    assert len(_core.Block(0)) == 0
    with pytest.raises(moses.MosesError) as caught:
        _core.Block(1 << 62)
    assert caught.value.code == "out_of_memory"
    assert buffer(torch.ones(3, dtype=torch.bfloat16)).dtype == np.int16
