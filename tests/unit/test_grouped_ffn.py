"""The experts' FFN in one op: it equals plain torch, and no row or gradient is touched by what lies beside it in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from moses import _core
from moses.buffers import empty
from moses.errors import DispatchError
from moses.ops import ACTIVATIONS, grouped_ffn, grouped_ffn_reference, grouped_linear
from moses.ops.crew import groups
from moses.ops.ffn import grouped_ffn_backward_reference
from moses.ops.products import padded_rows, slices

LOADS = [3, 0, 17, 1, 0]  # rows an expert; two more are nobody's
D, F = 6, 10


def case(dtype=torch.float64, gated=True, transposed=False, loads=LOADS, extra=2, width=D, inner=F, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    high = inner * (1 + gated)
    into = draw(len(loads), width, high) if transposed else draw(len(loads), high, width)
    out = draw(len(loads), inner, width) if transposed else draw(len(loads), width, inner)
    offsets = torch.tensor([0, *loads]).cumsum(0)
    return draw(sum(loads) + extra, width), into, out, offsets


def poison():
    """Fill the free memory of the pool with NaN."""
    held = [
        empty((size,), torch.float32).fill_(float("nan"))
        for size in (1 << 14, 1 << 15, 1 << 16, 1 << 18)
        for _ in range(4)
    ]
    del held


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_op_and_its_gradients_are_plain_torch(activation, gated, transposed):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        x, into, out, offsets = case(dtype, gated, transposed)
        wide = [tensor.detach().double() for tensor in (x, into, out)]
        wanted, _ = grouped_ffn_reference(*wide, offsets, activation, gated, transposed, False)
        upper = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        poison()
        y = grouped_ffn(x, into, out, offsets, activation, gated=gated, transposed=transposed)
        y.backward(upper)
        settings_ = (offsets, activation, gated, transposed, True, True)
        gradients = grouped_ffn_backward_reference(upper.double(), wide[0], wanted, *wide[1:], *settings_)
        assert y.dtype == dtype
        pairs = [(y, wanted), *((mine.grad, theirs) for mine, theirs in zip((x, into, out), gradients, strict=True))]
        for found, exact in pairs:
            scale = exact.abs().max()
            assert ((found.double() - exact).abs().max() / scale) < tolerance, (dtype, activation)
        assert (y[-2:] == 0).all() and (x.grad[-2:] == 0).all(), "rows that are nobody's"
        for grad in (into.grad, out.grad):
            assert (grad[[1, 4]] == 0).all(), "experts that have no rows"
            assert all(grad[expert].abs().sum() > 0 for expert in (0, 2, 3))


@pytest.mark.parametrize("gated", [False, True])
def test_first_and_second_derivatives(gated):
    x, into, out, offsets = case(gated=gated, loads=[2, 0, 3], extra=1, width=3, inner=2)
    call = lambda x, into, out: grouped_ffn(x, into, out, offsets, "silu", gated=gated)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, into, out))
    assert torch.autograd.gradgradcheck(call, (x, into, out))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_ops_pass_opcheck():
    for dtype in (torch.float64, torch.float32):
        x, into, out, offsets = case(dtype)
        torch.library.opcheck(torch.ops.moses.grouped_ffn.default, (x, into, out, offsets, "silu", True, False, True))
        plain = [tensor.detach() for tensor in (x, into, out)]
        y, hidden = torch.ops.moses.grouped_ffn(*plain, offsets, "silu", True, False, True)
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.moses.grouped_ffn_backward.default,
                (y, plain[0], hidden, *plain[1:], offsets, "silu", True, False, *wanted),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_beside_an_experts_rows_never_reaches_it(dtype):
    """Products take more rows than an expert has: NaNs of the neighbours and of old memory must stay where they are."""
    x, into, out, offsets = case(dtype, loads=[18, 19, 33], extra=0, width=64, inner=1024)
    clean = grouped_ffn(x, into, out, offsets, "silu")
    clean_x, clean_into, clean_out = torch.autograd.grad(clean.sum(), (x, into, out))
    for bad in (0, 1, 2):
        rows = slice(int(offsets[bad]), int(offsets[bad + 1]))
        spoiled = x.detach().clone()
        spoiled[rows] = float("nan")
        spoiled.requires_grad_()
        poison()
        y = grouped_ffn(spoiled, into, out, offsets, "silu")
        grad_x, grad_into, grad_out = torch.autograd.grad(y.sum(), (spoiled, into, out))
        kept = torch.ones(70, dtype=torch.bool)
        kept[rows] = False
        others = [expert for expert in range(3) if expert != bad]
        assert y[rows].isnan().all() and grad_into[bad].isnan().any()
        assert torch.equal(y[kept], clean[kept]) and torch.equal(grad_x[kept], clean_x[kept])
        assert torch.equal(grad_into[others], clean_into[others]) and torch.equal(grad_out[others], clean_out[others])


@settings(max_examples=40, deadline=None)
@given(
    loads=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu_new", "gelu"]),
)
def test_any_loads(loads, extra, dtype, activation):
    x, into, out, offsets = case(dtype, loads=loads, extra=extra, width=16, inner=8, seed=len(loads))
    poison()
    y = grouped_ffn(x, into, out, offsets, activation)
    y.backward(torch.ones(()).to(dtype).expand(y.shape))
    wide = [tensor.detach().double() for tensor in (x, into, out)]
    wanted, hidden = grouped_ffn_reference(*wide, offsets, activation, True, False, True)
    exact = grouped_ffn_backward_reference(
        torch.ones_like(wanted), wide[0], hidden, *wide[1:], offsets, activation, True, False, True, True
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for found, theirs in zip((y, x.grad, into.grad, out.grad), (wanted, *exact), strict=True):
        assert found.isfinite().all()
        if theirs.numel():
            assert (found.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def test_sizes_of_products_repeat():
    for dtype in (torch.float32, torch.float64):
        assert all(padded_rows(count, dtype) == count for count in range(1, 100))
    padded = [padded_rows(count, torch.bfloat16) for count in range(1, 8193)]
    assert all(count <= size for count, size in enumerate(padded, 1))
    assert all(size <= count * 17 / 16 + 1 for count, size in enumerate(padded, 1) if count >= 512)
    assert len(set(padded)) < 128  # oneDNN keeps 1,024 kernels, and a layer has six products
    found = [(part.expert, part.start, part.end, part.padded) for part in slices([0, 0, 5, 40, 40], torch.bfloat16)]
    assert found == [(1, 0, 5, 8), (2, 5, 40, 48)]


def test_a_backward_never_makes_a_gradient_of_all_experts_for_one():
    experts = 48
    x, into, out, offsets = case(torch.float32, loads=[2] * experts, extra=0, width=32, inner=32)
    weights = (into.numel() + out.numel()) * 4
    _core.pool_clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        grouped_ffn(x, into, out, offsets, "silu").sum().backward()
    made = sum(max(event.self_cpu_memory_usage, 0) for event in found.events())
    assert made + _core.pool_bytes() < 4 * weights, "bytes"
    assert into.grad.shape == into.shape


def test_frozen_experts_and_rows_cost_no_gradient(monkeypatch):
    x, into, out, offsets = case(torch.float32)
    calls = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **named: calls.append(1) or original(*args, **named))
    y = grouped_ffn(x, into.detach(), out.detach(), offsets, "silu")
    assert len(calls) == 6
    y.sum().backward()
    assert len(calls) == 12 and x.grad is not None
    calls.clear()
    grouped_ffn(x.detach(), into, out.detach(), offsets, "silu").sum().backward()
    assert len(calls) == 15 and out.grad is None


def test_inference_keeps_no_hidden_rows():
    x, into, out, offsets = (tensor.detach() for tensor in case(torch.float32, loads=[300, 200], width=64, inner=256))
    _, hidden = torch.ops.moses.grouped_ffn(x, into, out, offsets, "silu", True, False, False)
    assert hidden.shape == (0, 512)
    y = grouped_ffn(x, into, out, offsets, "silu")
    torch.testing.assert_close(y, grouped_ffn(x.clone().requires_grad_(), into, out, offsets, "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bit_identical_for_any_number_of_threads(dtype):
    x, into, out, offsets = case(dtype, loads=[250, 230, 0, 241, 259], width=64, inner=96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            poison()
            y = grouped_ffn(x, into, out, offsets, "silu")
            found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, into, out))))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def test_threads_share_experts_out_in_order_where_they_can():
    even = list(slices(list(range(0, 1601, 100)), torch.float32))
    for threads in (2, 3, 4):
        shared = groups(even, threads)
        assert len(shared) == threads and [part for group in shared for part in group] == even
        assert max(map(len, shared)) - min(map(len, shared)) <= 1
    assert groups(even, 1) == [even]
    skewed = list(slices([0, 900, 1000, 1100], torch.float32))
    assert groups(skewed, 2) == [skewed], "one thread would wait for the other"
    few = list(slices([0, 10, 20], torch.float32))
    assert groups(few, 2) == [few]


def test_what_does_not_fit_is_refused():
    x, into, out, offsets = case()
    for arguments, named in (
        ((x, into, out, offsets, "sine"), {}),
        ((x, into, out, offsets, "silu"), {"gated": False}),
        ((x, into, out[:-1], offsets, "silu"), {}),
        ((x, into, out.float(), offsets, "silu"), {}),
        ((x.float(), into, out, offsets, "silu"), {}),
        ((x, into, out, offsets[1:], "silu"), {}),
    ):
        with pytest.raises(DispatchError) as caught:
            grouped_ffn(*arguments, **named)
        assert caught.value.code == "dispatch_arguments"


def test_grouped_linear_pads_as_well():
    x, into, _, offsets = case(torch.bfloat16, loads=[18, 0, 19, 33], extra=0, width=64, inner=96)
    poison()
    y = grouped_linear(x, into, offsets)
    y.sum().backward()
    for expert in range(4):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        torch.testing.assert_close(y[rows], x[rows] @ into[expert].T, rtol=0.02, atol=0.05)
        torch.testing.assert_close(into.grad[expert], x[rows].sum(0).expand(192, 64), rtol=0.02, atol=0.2)
