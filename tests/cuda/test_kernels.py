"""The kernels on the host against the references in plain torch: the same bits for any grid, order of threads, alignment, dtype and skew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moses.cuda import kernels
from moses.ops.combine import combine_backward_weights_reference, combine_backward_y_reference, combine_reference
from moses.ops.gather import gather_backward_reference, gather_reference
from moses.plan import dispatch_plan_reference, index_dtype, num_rows

GRIDS = st.one_of(
    st.none(),
    st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 8, 32, 45]), st.integers(1, 3), st.integers(0, 99)),
)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def same(found, wanted):
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    )


def draw_ids(tokens, top_k, experts, skew, seed, dtype=torch.int64):
    """Ids of one expert in particular, or of all with a skew."""
    uniform = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((uniform**skew) * experts).long().clamp(max=experts - 1).to(dtype)


@given(
    experts=st.one_of(st.sampled_from([1, 2, 64, 255, 256, 257, 4096, 65_536, 65_537, 70_000]), st.integers(1, 300)),
    top_k=st.integers(1, 3),
    tokens=st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 256, 257]), st.integers(0, 700)),
    capacity=st.one_of(st.none(), st.integers(1, 90)),
    pad=st.booleans(),
    skew=st.sampled_from([1, 1, 3, 40]),
    ids_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    grid=GRIDS,
    seed=st.integers(0, 999),
)
@settings(SHARED, max_examples=100)
def test_the_plan_is_the_references(on_host, experts, top_k, tokens, capacity, pad, skew, ids_dtype, grid, seed):
    if experts > 2**15 and ids_dtype == torch.int16:
        ids_dtype = torch.int32
    pad = pad and capacity is not None
    if pad and experts > 4096:
        capacity = 1
    ids = draw_ids(tokens, top_k, experts, skew, seed, ids_dtype)
    rows = num_rows(ids.numel(), experts, capacity, pad)
    on_host(grid)
    wanted = dispatch_plan_reference(ids, experts, capacity, pad)
    for dtype in (index_dtype(ids.numel(), rows), torch.int64):
        found = kernels.plan(ids, experts, capacity, pad, rows, dtype)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.long(), other.long())
        assert [one.dtype for one in found] == [dtype, dtype, torch.int64, torch.int64]


@pytest.mark.parametrize("experts", [3, 300])
@pytest.mark.parametrize("pairs", [255, 256, 257, 511, 512])
def test_nothing_behind_the_last_pair_is_read(on_host, pairs, experts):
    memory = torch.full((pairs + 1, 1), -1)
    memory[:pairs] = torch.arange(pairs)[:, None] % 3
    on_host()
    order, *_ = kernels.plan(memory[:pairs], experts, None, False, pairs, torch.int32)
    assert torch.equal(order, dispatch_plan_reference(memory[:pairs], experts, None, False)[0])


@pytest.mark.parametrize(("experts", "steps"), [(256, ["rank", "place"]), (65_536, ["rank", "move"] * 2 + ["rows"])])
def test_a_pass_takes_eight_bits(on_host, experts, steps):
    host = on_host()
    kernels.plan(draw_ids(300, 2, experts, 1, 0), experts, None, False, 600, torch.int32)
    assert [kernel.split("_")[1] for kernel in host.started] == steps


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_an_id_out_of_range_is_refused(on_host, host_module, bad, dtype):
    ids = torch.zeros(600, 1, dtype=dtype)
    ids[555] = bad
    on_host()
    with pytest.raises(host_module.RefusedError, match="an expert id is not in"):
        kernels.plan(ids, 4, None, False, 600, torch.int32)


def test_an_id_that_32_bits_would_make_right_is_refused(on_host, host_module):
    ids = torch.zeros(600, 1, dtype=torch.int64)
    ids[5] = 2**40
    on_host()
    for experts in (4, 300):
        with pytest.raises(host_module.RefusedError):
            kernels.plan(ids, experts, None, False, 600, torch.int32)


def made_rows(dtype, tokens, top_k, width, capacity, pad, shift, wide, seed=0):
    """x, y, weights and a plan: rows begin `shift` items after a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (tokens, top_k), generator=generator)
    order, inverse, _, _ = dispatch_plan_reference(ids, 5, capacity, pad and capacity is not None)
    if wide:
        order, inverse = order.long(), inverse.long()

    def draw(rows):
        memory = torch.randn(rows * width + shift, generator=generator, dtype=torch.float64).to(dtype)
        return memory[shift:].view(rows, width)

    weights = torch.randn(tokens, top_k, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return draw(tokens), draw(order.shape[0]), weights, order, inverse


WIDTHS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 20, 31, 32, 33, 40, 64, 72, 264])


@given(
    dtype=st.sampled_from(list(kernels.NAMES)),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 3),
    width=WIDTHS,
    capacity=st.one_of(st.none(), st.integers(1, 12)),
    pad=st.booleans(),
    shift=st.sampled_from([0, 0, 1, 2, 4]),
    wide=st.booleans(),
    grid=GRIDS,
    seed=st.integers(0, 99),
)
@settings(SHARED, max_examples=200)
def test_rows_have_the_references_bits(on_host, dtype, tokens, top_k, width, capacity, pad, shift, wide, grid, seed):
    x, y, weights, order, inverse = made_rows(dtype, tokens, top_k, width, capacity, pad, shift, wide, seed)
    on_host(grid)
    assert same(kernels.gather(x, order, inverse, top_k), gather_reference(x, order, inverse, top_k))
    assert same(kernels.gather_backward(y, order, inverse, top_k), gather_backward_reference(y, order, inverse, top_k))
    assert same(kernels.combine(y, order, inverse, weights), combine_reference(y, order, inverse, weights))
    assert same(
        kernels.combine_backward_y(x, order, inverse, weights),
        combine_backward_y_reference(x, order, inverse, weights),
    )
    assert same(
        kernels.combine_backward_weights(x, y, order, inverse, top_k),
        combine_backward_weights_reference(x, y, order, inverse, top_k),
    )


@pytest.mark.parametrize("dtype", list(kernels.NAMES))
def test_the_widest_copy_that_width_and_address_allow(on_host, dtype):
    item = dtype.itemsize
    for width, shift in (
        (64, 0),
        (64, 8 // item),
        (72 // item, 0),
        (64, 4 // item or 1),
        (12 // item or 1, 0),
        (64, 1),
    ):
        x, y, weights, order, inverse = made_rows(dtype, 9, 2, width, None, False, shift, False)
        address, row = x.data_ptr(), width * item
        unit = next(unit for unit in (16, 8, 4, 2) if address % unit == 0 and row % unit == 0)
        host = on_host()
        kernels.gather(x, order, inverse, 2)
        assert host.started == [f"gather_{unit}_int32"]
        host = on_host()
        kernels.combine(y, order, inverse, weights)
        items = 16 // item if unit == 16 else 1
        assert host.started == [f"combine_{kernels.NAMES[dtype]}_x{items}_int32"]


def test_rows_of_any_strides(on_host):
    order, inverse, _, _ = dispatch_plan_reference(torch.tensor([[1, 0], [0, 1], [2, 0]]), 3, None, False)
    wide = torch.randn(3, 24)
    on_host()
    for x in (
        wide[:, :8],
        wide[:, 3:11],
        wide[:, ::3],
        wide[:1].expand(3, 24),
        wide[:, :1].expand(3, 8),
        torch.randn(8, 3).t(),
    ):
        assert same(kernels.gather(x, order, inverse, 2), gather_reference(x, order, inverse, 2))
        weights = torch.rand(2, 3).t()
        y = x.repeat_interleave(2, 0).t().contiguous().t()
        assert same(kernels.combine(y, order, inverse, weights), combine_reference(y, order, inverse, weights))
        assert same(
            kernels.combine_backward_y(x, order, inverse, weights),
            combine_backward_y_reference(x, order, inverse, weights),
        )


@pytest.mark.parametrize("dtype", list(kernels.NAMES))
def test_numbers_that_are_not_usual(on_host, dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7, -6e-8, 65519.0, 65520.0, 3.4e38, 1e-45]).to(
        dtype
    )
    y = special.repeat_interleave(10).view(-1, 10) + special * 0.0009765625
    y = torch.cat([y, special.expand(10, 10)]).nan_to_num(nan=1.0)
    order = inverse = torch.arange(20, dtype=torch.int32)
    weights = torch.ones(10, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32) / 3
    on_host()
    for found, wanted in (
        (kernels.combine(y, order, inverse, weights), combine_reference(y, order, inverse, weights)),
        (kernels.gather_backward(y, order, inverse, 2), gather_backward_reference(y, order, inverse, 2)),
    ):
        assert torch.equal(found.isnan(), wanted.isnan()) and same(
            found.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0)
        )
    nan = torch.full((20, 10), float("nan"), dtype=dtype)
    assert same(kernels.gather(nan[:10], order, inverse, 2), gather_reference(nan[:10], order, inverse, 2))
    assert kernels.combine(nan, order, inverse, weights).isnan().all()


def test_indices_out_of_range_are_refused(on_host, host_module):
    x, y, weights, order, inverse = made_rows(torch.float32, 4, 2, 8, None, False, 0, False)
    on_host()
    for bad in (8, 2**31 - 1):
        wrong = torch.arange(8, dtype=torch.int32)
        wrong[3] = bad
        for call in (
            lambda: kernels.gather(x, wrong, inverse, 2),  # noqa: B023
            lambda: kernels.gather_backward(y, order, wrong, 2),  # noqa: B023
            lambda: kernels.combine(y, order, wrong, weights),  # noqa: B023
            lambda: kernels.combine_backward_y(x, wrong, inverse, weights),  # noqa: B023
            lambda: kernels.combine_backward_weights(x, y, order, wrong, 2),  # noqa: B023
        ):
            with pytest.raises(host_module.RefusedError, match="out of range"):
                call()


def test_threads_of_a_block_go_where_there_is_work(on_host, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, blocks, threads, *_: seen.append((blocks, threads)))
    device = torch.device("cpu")
    for rows, packs in ((1, 1), (100_000, 3), (100_000, 128), (8, 900), (2**40, 2**33), (0, 5), (5, 0)):
        kernels._rows("kernel", rows, packs, device)
    assert seen == [(1, (1, 256)), (1563, (4, 64)), (12_500, (32, 8)), (8, (256, 1)), (2**37, (32, 8))]
