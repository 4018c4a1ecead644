"""The mixture of FFN experts: the same as all neurons weighted by gates, computed by dispatch, parallel to the FFN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moses
from moses.routers.task import topk_gates
from moses.subexperts import SubExpertFFN
from moses.subexperts.ffn import mixture


def dense(x, down, up, experts, gates, scale):
    return scale * (F.gelu(x @ down.T) * gates[..., experts]) @ up


def case(seed, tokens, dim, experts, num_experts, top_k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.tensor(experts, dtype=torch.int64)
    x = torch.randn(*tokens, dim, generator=generator, dtype=dtype)
    down, up = torch.randn(2, len(experts), dim, generator=generator, dtype=dtype)
    gates = topk_gates(torch.randn(*tokens, num_experts, generator=generator, dtype=dtype), top_k)
    return x, down, up, experts, gates, int(torch.bincount(experts).max())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.tuples(st.integers(0, 3), st.integers(1, 5)), dim=st.sampled_from([1, 5, 8]))
def test_it_is_all_neurons_weighted_by_the_gates_of_their_experts(data, tokens, dim):
    num_experts = data.draw(st.integers(1, 5))
    top_k = data.draw(st.integers(1, num_experts))
    # in any order, and some experts with none: what a cut leaves
    experts = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=20))
    x, down, up, experts, gates, width = case(data.draw(st.integers(0, 99)), tokens, dim, experts, num_experts, top_k)
    found = mixture(x, down, up, experts, gates, width=width, top_k=top_k, scale=0.5)
    torch.testing.assert_close(found, dense(x, down, up, experts, gates, 0.5))


def test_gradients():
    x, down, up, experts, gates, width = case(0, (2, 3), 4, [2, 0, 0, 2, 0, 3], 4, 2)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, down, up)]
    # a gate of zero stays zero in training: only those of the experts used are moved
    used, experts_used = gates.topk(2)
    used = used.detach().requires_grad_()

    def function(x, down, up, used):
        whole = torch.zeros_like(gates).scatter(-1, experts_used, used)
        return mixture(x, down, up, experts, whole, width=width, top_k=2, scale=0.5)

    assert torch.autograd.gradcheck(function, (*inputs, used))
    assert torch.autograd.gradgradcheck(function, (*inputs, used))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_model_and_of_autocast(dtype):
    x, down, up, experts, gates, width = case(1, (2, 7), 16, [0, 1, 1, 2, 2, 2], 4, 2, torch.float32)
    expected = dense(x, down, up, experts, gates, 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = mixture(x, down, up, experts, gates, width=width, top_k=2)
    assert found.dtype == dtype
    assert mixture(x.to(dtype), down, up, experts, gates, width=width, top_k=2).dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-4)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "moses":
            first = result[0] if isinstance(result, tuple) else result
            self.rows.setdefault(function.__name__.split(".")[0], []).append(first.shape[0])
        return result


def learn(model, batch, name="a", similar_to=None):
    model.begin_task(name, num_labels=2 if model._head is not None else None, similar_to=similar_to)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.end_task(name)
    model.eval()


def test_tokens_are_dispatched_each_to_its_experts_only(tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(ffn_experts="adapter")), tiny_batch("llama")
    learn(model, batch)
    with model.task("a"), torch.no_grad(), Ops() as ops:
        model(**batch)
    pairs = batch["input_ids"].numel() * 2  # top-2 of 4 experts
    assert ops.rows["gather"] == [pairs] * 2 and ops.rows["grouped_linear"] == [pairs] * 4
    assert ops.rows["combine"] == [pairs // 2] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "t5", "bert"])
def test_it_is_parallel_to_the_ffn_and_before_the_residual_sum(family, tiny_model, tiny_batch):
    """With experts that answer a constant c, whatever the token, the block's FFN answers ffn(x) + c."""
    model, batch = moses.attach(tiny_model(family), moses.MosesConfig(ffn_experts="adapter")), tiny_batch(family)
    learn(model, batch)
    path, layer = [(path, layer) for path, layer in model._banks().items() if isinstance(layer, SubExpertFFN)][-1]
    constant = torch.linspace(-1, 1, 32)
    layer._update = lambda y, x, task, gates: y + constant
    seen = {}
    parts = [layer.base_layer, layer]
    if family == "bert":
        parts.append(model.get_submodule(path.replace("output", "intermediate")))
    for part in parts:
        part.register_forward_hook(lambda part, args, result: seen.update({part: (args, result)}))
    with model.task("a"), torch.no_grad():
        model(**batch)
    (args, result), (_, inner) = seen[layer], seen[layer.base_layer]
    if family == "bert":
        (x,), hidden = seen[parts[2]]
        output = layer.base_layer
        torch.testing.assert_close(args, (hidden, x))
        torch.testing.assert_close(result, output.LayerNorm(output.dense(hidden) + constant + x))
    else:
        torch.testing.assert_close(result, layer.base_layer(*args) + constant)
        torch.testing.assert_close(result, inner + constant)


def test_a_task_does_not_depend_on_what_other_rows_are_answered_for(tiny_model, tiny_batch):
    model = moses.attach(tiny_model("llama"), moses.MosesConfig(ffn_experts="adapter"))
    batch = tiny_batch("llama", rows=5)
    for seed, name in enumerate("abc"):
        learn(model, tiny_batch("llama", seed=seed), name)
    answers = []
    for others in ([1, 2, -1], [-1, -1, -1], [2, 2, 1]):
        with model.tasks_of_rows(torch.tensor([0, *others, 0])), torch.no_grad():
            answers.append(model(**batch).logits)
    for answer in answers[1:]:
        assert torch.equal(answer[[0, 4]], answers[0][[0, 4]])
        assert not torch.equal(answer[1:4], answers[0][1:4])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_a_router_a_layer_the_mixture_has_its_own_on_the_ffns_input(family, tiny_model, tiny_batch):
    config = moses.MosesConfig(ffn_experts="adapter", router="layer", router_dim=None)
    model, batch = moses.attach(tiny_model(family), config), tiny_batch(family)
    assert list(model._routers()) == list(model._banks())
    learn(model, batch)
    layer = next(layer for layer in model._banks().values() if isinstance(layer, SubExpertFFN))
    seen = []
    layer.router.gates, gates = lambda x: seen.append(x) or gates(x), layer.router.gates
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[-1]))
    with model.task("a"), torch.no_grad():
        model(**batch)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_a_cut_leaves_experts_of_uneven_width_and_what_it_drops_takes_no_part(tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(ffn_experts="adapter")), tiny_batch("llama")
    model.begin_task("a")
    bank = model.get_submodule("model.layers.0.mlp").bank
    with torch.no_grad():
        for layer in model._banks().values():
            layer.bank.free_B.normal_(generator=torch.Generator().manual_seed(0))
        # of expert e the first e + 1 neurons matter, and more than anything else
        experts = bank._candidates.fresh // bank.rank
        turn = torch.arange(len(experts)) - torch.searchsorted(experts, experts)
        bank.free_B *= 100 * (turn <= experts)[:, None]
    assert bank.width(0) == turn.max() + 1 > 4
    model.cut_task()
    kept = bank._candidates.fresh[bank._candidates.kept] // bank.rank
    assert torch.bincount(kept).tolist() == [1, 2, 3, 4] and bank.width(0) == 4
    with torch.no_grad():
        before = model(**batch).logits
        dropped = torch.ones(len(bank.free_B), dtype=torch.bool)
        dropped[bank._candidates.kept] = False
        bank.free_B[dropped] = float("nan")
        assert torch.equal(model(**batch).logits, before)
    model.end_task("a")
    assert bank.width(0) == 4
    with model.task("a"), torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("granularity", ["rank", "element"])
@pytest.mark.parametrize("open_task", [False, True])
def test_nothing_waits_for_a_device(granularity, open_task, tiny_model, tiny_batch):
    """Of tensors without values nothing can be read: whatever asks for one raises."""
    config = moses.MosesConfig(ffn_experts="adapter", granularity=granularity)
    model, batch = moses.attach(tiny_model("llama"), config), tiny_batch("llama")
    learn(model, batch)
    layer = model.get_submodule("model.layers.0.mlp")
    if open_task:
        model.begin_task("b", similar_to="a")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, gates = torch.randn(2, 5, 32), torch.rand(2, 5, 4)
        assert layer._update(x, x, int(open_task), gates).shape == x.shape
