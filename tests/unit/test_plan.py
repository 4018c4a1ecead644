"""The dispatch plan on hand-made cases and at its edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import moses
from moses import _core
from moses.errors import DispatchError
from moses.plan import dispatch_plan_reference

IDS = torch.tensor([[2, 0], [0, 1], [2, 2], [0, 2]])


def test_a_plan_by_hand():
    plan = moses.dispatch_plan(IDS, 4)
    assert plan.order.tolist() == [1, 2, 6, 3, 0, 4, 5, 7]
    assert plan.inverse.tolist() == [4, 0, 1, 3, 5, 6, 2, 7]
    assert plan.offsets.tolist() == [0, 3, 4, 8, 8]
    assert plan.counts.tolist() == [3, 1, 4, 0]
    assert (plan.num_tokens, plan.top_k, plan.num_experts, plan.num_rows, plan.num_dropped) == (4, 2, 4, 8, 0)


def test_capacity_drops_the_last_pairs_of_an_expert():
    plan = moses.dispatch_plan(IDS, 4, capacity=2)
    assert plan.order.tolist() == [1, 2, 3, 0, 4, -1, -1, -1]
    assert plan.inverse.tolist() == [3, 0, 1, 2, 4, -1, -1, -1]
    assert plan.offsets.tolist() == [0, 2, 3, 5, 5]
    assert plan.counts.tolist() == [2, 1, 2, 0]
    assert plan.num_dropped == 3


def test_capacity_pads_every_expert_to_it():
    plan = moses.dispatch_plan(IDS, 4, capacity=3, pad=True)
    assert plan.order.tolist() == [1, 2, 6, 3, -1, -1, 0, 4, 5, -1, -1, -1]
    assert plan.inverse.tolist() == [6, 0, 1, 3, 7, 8, 2, -1]
    assert plan.offsets.tolist() == [0, 3, 6, 9, 12]
    assert plan.counts.tolist() == [3, 1, 3, 0]
    assert plan.num_dropped == 1


def test_numpy_gives_read_only_numpy(monkeypatch):
    seen = []
    real = _core.dispatch_plan
    monkeypatch.setattr(_core, "dispatch_plan", lambda ids, *rest: seen.append(ids) or real(ids, *rest))
    for dtype in (np.int64, np.int32, np.uint8, np.uint16, ">i4"):
        given = IDS.numpy().astype(dtype)
        given.flags.writeable = False
        plan = moses.dispatch_plan(given, 4)
        assert isinstance(plan.order, np.ndarray) and plan.order.tolist() == [1, 2, 6, 3, 0, 4, 5, 7]
        assert (seen[-1] is given) == (dtype in (np.int64, np.int32, np.uint8))  # read where they are
        with pytest.raises(ValueError, match="read-only"):
            plan.order[0] = 3
    assert (
        moses.dispatch_plan(IDS.numpy()[::-1], 4).order.tolist() == moses.dispatch_plan(IDS.flip(0), 4).order.tolist()
    )


def test_every_integer_dtype_and_any_strides():
    wanted = moses.dispatch_plan(IDS, 4)
    views = [
        *(IDS.to(dtype) for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)),
        IDS.t().contiguous().t(),
        torch.stack([IDS, IDS], dim=2)[:, :, 0],
    ]
    for ids in views:
        assert torch.equal(moses.dispatch_plan(ids, 4).order, wanted.order)
    expanded = torch.tensor([[3, 1]]).expand(5, 2)
    assert moses.dispatch_plan(expanded, 4).order.tolist() == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]


def test_no_tokens():
    for pad in (False, True):
        plan = moses.dispatch_plan(torch.zeros(0, 2, dtype=torch.int64), 3, capacity=2, pad=pad)
        assert plan.order.tolist() == ([-1] * 6 if pad else [])
        assert plan.counts.tolist() == [0, 0, 0]
        assert plan.inverse.shape == (0,)


def test_all_to_one_expert_and_k_equal_to_the_experts():
    one = moses.dispatch_plan(torch.full((1000, 1), 5), 7)
    assert torch.equal(one.order, torch.arange(1000, dtype=torch.int32))
    assert one.offsets.tolist() == [0, 0, 0, 0, 0, 0, 1000, 1000]
    every = moses.dispatch_plan(torch.arange(3).expand(4, 3), 3)
    assert every.order.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_more_experts_than_16_bits_count():
    ids = torch.randint(0, 70_000, (3000, 2), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 69_999
    plan = moses.dispatch_plan(ids, 70_000)
    assert torch.equal(plan.order.long(), ids.flatten().argsort(stable=True))
    assert plan.counts[-1] >= 1


@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**40)])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_an_id_out_of_range_names_its_token(bad, as_numpy):
    ids = IDS.clone()
    ids[2, 1] = bad
    ids[3, 0] = -9
    with pytest.raises(DispatchError, match=f"token 2, slot 1 names expert {bad} of 4") as caught:
        moses.dispatch_plan(ids.numpy() if as_numpy else ids, 4)
    assert caught.value.code == "expert_id_range"


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (IDS.float(), (4,), "give integers"),
        (IDS.numpy().astype(float), (4,), "give integers"),
        (IDS.tolist(), (4,), "torch tensor or a numpy array"),
        (IDS[0], (4,), r"give \(tokens, top_k\)"),
        (IDS[:, :0], (4,), "top_k at least 1"),
        (IDS, (0,), "num_experts is 0"),
        (IDS, (2**24 + 1,), "num_experts is"),
        (IDS, (1,), "top_k is 2 where there are 1 experts"),
        (IDS, (4, 0), "capacity is 0"),
    ],
)
def test_arguments_that_do_not_fit(ids, arguments, message):
    with pytest.raises(DispatchError, match=message) as caught:
        moses.dispatch_plan(ids, *arguments)
    assert caught.value.code == "dispatch_arguments"


def test_padding_wants_a_capacity():
    with pytest.raises(DispatchError, match="without a capacity"):
        moses.dispatch_plan(IDS, 4, pad=True)


def test_a_plan_is_immutable_and_says_what_it_is():
    plan = moses.dispatch_plan(IDS, 4, capacity=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.order = plan.inverse
    assert plan.bytes == 8 * 4 + 8 * 4 + 5 * 8 + 4 * 8
    assert repr(plan) == (
        "DispatchPlan(num_tokens=4, top_k=2, num_experts=4, capacity=3 (drop), rows=8, load 0 to 3, 1 idle, 1 dropped, 136 bytes, cpu)"
    )


def test_meta_tensors_carry_more_than_2_to_the_31_pairs():
    plan = moses.dispatch_plan(torch.empty(2**30, 4, dtype=torch.int64, device="meta"), 64)
    assert plan.order.shape == (2**32,)
    assert plan.order.dtype == plan.inverse.dtype == torch.int64
    assert "meta" in repr(plan)
    small = moses.dispatch_plan(torch.empty(2**20, 4, dtype=torch.int64, device="meta"), 64)
    assert small.order.dtype == torch.int32


def test_compile_traces_the_plan_whole():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def route(scores):
        plan = moses.dispatch_plan(scores.topk(2).indices, 4, capacity=6)
        return plan.order, plan.inverse, plan.offsets, plan.counts

    scores = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    wanted = dispatch_plan_reference(scores.topk(2).indices, 4, 6, False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(route(scores), wanted, strict=True))
