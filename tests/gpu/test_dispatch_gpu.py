"""The CUDA kernels on a CUDA device: the references' bits, any stream, graphs, no wait for the device. `make test-gpu` runs them."""

from __future__ import annotations

import pytest
import torch

import moses
from moses.cuda import kernels
from moses.ops.combine import combine_backward_weights_reference, combine_backward_y_reference, combine_reference
from moses.ops.gather import gather_backward_reference, gather_reference
from moses.plan import dispatch_plan_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def routed(tokens=5000, experts=37, top_k=2, width=256, dtype=torch.float32, capacity=None):
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(experts, (tokens, top_k), generator=generator, device="cuda")
    plan = moses.dispatch_plan(ids, experts, capacity)
    x = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype)
    y = torch.randn(plan.num_rows, width, generator=generator, device="cuda").to(dtype)
    weights = torch.rand(
        tokens,
        top_k,
        generator=generator,
        device="cuda",
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    return ids, plan, x, y, weights


@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize("experts", [1, 37, 70_000])
def test_plans_are_the_references(experts, capacity):
    ids, plan, *_ = routed(experts=experts, top_k=1, capacity=capacity)
    wanted = dispatch_plan_reference(ids.cpu(), experts, capacity, False)
    assert all(
        torch.equal(one.cpu(), two)
        for one, two in zip((plan.order, plan.inverse, plan.offsets, plan.counts), wanted, strict=True)
    )
    assert not kernels._warned, "the kernels were not there"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 256, 1000])
def test_rows_have_the_references_bits(dtype, width):
    _, plan, x, y, weights = routed(width=width, dtype=dtype, capacity=120)
    order, inverse, ops = plan.order, plan.inverse, torch.ops.moses
    for op, reference, arguments in (
        (ops.gather, gather_reference, (x, order, inverse, 2)),
        (ops.gather_backward, gather_backward_reference, (y, order, inverse, 2)),
        (ops.combine, combine_reference, (y, order, inverse, weights)),
        (ops.combine_backward_y, combine_backward_y_reference, (x, order, inverse, weights)),
        (ops.combine_backward_weights, combine_backward_weights_reference, (x, y, order, inverse, 2)),
    ):
        on_cpu = [argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        assert torch.equal(op(*arguments).cpu(), reference(*on_cpu)), op
        assert torch.equal(op(*arguments), op(*arguments))


def test_nothing_waits_for_the_device_and_a_graph_can_be_captured():
    ids, _, x, _, weights = routed()

    def forward():
        made = moses.dispatch_plan(ids, 37)
        return moses.ops.combine(moses.ops.gather(x, made), made, weights)

    wanted = forward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward()
    graph.replay()
    assert torch.equal(found, wanted)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = forward()
        torch.cuda.current_stream().synchronize()
    assert torch.equal(other, wanted)


def test_a_layer_trains_as_on_the_cpu():
    torch.manual_seed(0)
    made = moses.MoELayer(64, 128, 8, 2)
    x = torch.randn(512, 64)
    y, _ = made(x)
    y.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    made.cuda()
    z, _ = made(x.cuda())
    z.square().mean().backward()
    torch.testing.assert_close(z.cpu(), y, rtol=1e-2, atol=1e-3)
    for parameter, gradient in zip(made.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-2, atol=1e-3)
