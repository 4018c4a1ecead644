"""The CUDA kernels on a CUDA device: the references' bits, any stream and thread, graphs, no wait for the device. `make test-gpu` runs them."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import moses
from moses.cuda import launch
from moses.ops.combine import combine_backward_weights_reference, combine_backward_y_reference, combine_reference
from moses.ops.gather import gather_backward_reference, gather_reference
from moses.plan import dispatch_plan_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def routed(tokens=5000, experts=37, top_k=2, width=256, dtype=torch.float32, capacity=None, shift=0):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows):
        memory = torch.randn(rows * width + shift, generator=generator, device="cuda").to(dtype)
        return memory[shift:].view(rows, width)

    ids = torch.randint(experts, (tokens, top_k), generator=generator, device="cuda")
    plan = moses.dispatch_plan(ids, experts, capacity)
    weights = torch.rand(tokens, top_k, generator=generator, device="cuda")
    weights = weights.double() if dtype == torch.float64 else weights
    return ids, plan, draw(tokens), draw(plan.num_rows), weights


def calls(plan, x, y, weights, top_k):
    order, inverse, ops = plan.order, plan.inverse, torch.ops.moses
    return (
        (ops.gather, gather_reference, (x, order, inverse, top_k)),
        (ops.gather_backward, gather_backward_reference, (y, order, inverse, top_k)),
        (ops.combine, combine_reference, (y, order, inverse, weights)),
        (ops.combine_backward_y, combine_backward_y_reference, (x, order, inverse, weights)),
        (ops.combine_backward_weights, combine_backward_weights_reference, (x, y, order, inverse, top_k)),
    )


def test_the_kernels_are_there():
    assert launch.available(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("capacity", "pad"), [(None, False), (100, False), (100, True)])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(5000, 1), (5000, 37), (5000, 300), (5000, 70_000), (600_000, 64), (0, 4)]
)
def test_plans_are_the_references(tokens, experts, capacity, pad, ids_dtype):
    ids = torch.randint(experts, (tokens, 1), device="cuda", dtype=ids_dtype)
    plan = moses.dispatch_plan(ids, experts, capacity, pad=pad)
    wanted = dispatch_plan_reference(ids.cpu(), experts, capacity, pad)
    for one, other in zip((plan.order, plan.inverse, plan.offsets, plan.counts), wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.cpu(), other)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0, 1, 31, 256, 1000])
def test_rows_have_the_references_bits(dtype, width, shift):
    _, plan, x, y, weights = routed(width=width, dtype=dtype, capacity=120, shift=shift)
    for op, reference, arguments in calls(plan, x, y, weights, 2):
        on_cpu = [argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        first = op(*arguments)
        assert torch.equal(first.cpu(), reference(*on_cpu)), op
        assert all(torch.equal(op(*arguments), first) for _ in range(3)), op


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    _, plan, x, y, weights = routed(tokens=0, dtype=dtype)
    for op, _, arguments in calls(plan, x, y, weights, 2):
        assert op(*arguments).shape[0] == 0


def forward_of(ids, x, weights, experts=37):
    def forward():
        made = moses.dispatch_plan(ids, experts)
        return moses.ops.combine(moses.ops.gather(x, made), made, weights)

    return forward


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_device(dtype):
    ids, _, x, _, weights = routed(dtype=dtype)
    x.requires_grad_(), weights.requires_grad_()
    forward = forward_of(ids, x, weights)
    forward().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None


@pytest.mark.parametrize("experts", [37, 300])
def test_a_graph_is_captured_and_replayed_with_other_input(experts):
    ids, _, x, _, weights = routed(experts=experts)
    forward = forward_of(ids, x, weights, experts)
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward()
    for seed in range(3):
        torch.manual_seed(seed)
        ids.copy_(torch.randint(experts, ids.shape, device="cuda"))
        x.normal_()
        graph.replay()
        assert torch.equal(found, forward())


def test_another_stream_and_another_thread():
    ids, _, x, _, weights = routed()
    forward = forward_of(ids, x, weights)
    wanted, found = forward(), []

    def work():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found.append(forward())
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert len(found) == 5 and all(torch.equal(one, wanted) for one in found)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ids, _, x, _, weights = routed()
    wanted = forward_of(ids, x, weights)()
    with torch.cuda.device(1):
        assert torch.equal(forward_of(ids, x, weights)(), wanted)


def test_an_id_out_of_range_is_an_assert_of_the_device():
    # it ends the process's use of CUDA
    program = (
        "import torch, moses\n"
        "ids = torch.zeros(600, 1, dtype=torch.int64, device='cuda'); ids[555] = 9\n"
        "moses.dispatch_plan(ids, 4); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "an expert id is not in [0, num_experts)" in done.stderr


def test_gradients_are_the_cpus():
    ids, plan, x, _, weights = routed(tokens=300, width=40, dtype=torch.float64)
    on_cpu = [tensor.cpu().requires_grad_() for tensor in (x, weights)]
    on_cuda = [tensor.detach().requires_grad_() for tensor in (x, weights)]
    for (rows, share), made in ((on_cuda, plan), (on_cpu, moses.dispatch_plan(ids.cpu(), 37))):
        moses.ops.combine(moses.ops.gather(rows, made).square(), made, share).square().sum().backward()
    for one, other in zip(on_cuda, on_cpu, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad)


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
