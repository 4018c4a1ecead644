"""A growing layer: what is frozen cannot move, the model before a growth is the same weights with later experts out of sight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from moses.errors import DispatchError, ModelError, SurgeryError
from moses.growth.context import GrowthContext
from moses.growth.growing import GrowingLayer
from moses.growth.slots import slot_rows, slot_state
from moses.growth.values import from_bytes, spaces, to_bytes
from moses.surgery.plan import Slot

D, INNER, TOKENS = 16, 24, 40


def made(num_experts=3, gate=True, **settings):
    generator = torch.Generator().manual_seed(0)
    into, out, rows = (
        torch.randn(shape, generator=generator) * 0.3
        for shape in ((num_experts, 2 * INNER, D), (num_experts, D, INNER), (num_experts, D))
    )
    return GrowingLayer(into, out, rows if gate else None, vocab_size=50, **settings)


def inputs(seed=1):
    return torch.randn(2, TOKENS // 2, D, generator=torch.Generator().manual_seed(seed))


def copies(*sources, noise=0.01):
    return [Slot((source,), new=True, noise=noise) for source in sources]


def by_loops(layer, x, count):
    parts = layer.expert_tensors()
    result = []
    for token in x.reshape(-1, D):
        logits = parts["gate"][:count] @ token
        ids = sorted(range(count), key=lambda e: (-float(logits[e]), e))[: layer.top_k]
        weights = (logits.softmax(-1) if not layer.normalise else logits[ids].softmax(-1)).tolist()
        y = torch.zeros(D)
        for place, expert in enumerate(ids):
            gate, up = (parts["into"][expert] @ token).chunk(2)
            weight = weights[place] if layer.normalise else weights[expert]
            y = y + weight * (parts["out"][expert] @ (F.silu(gate) * up))
        result.append(y)
    return torch.stack(result).view(x.shape)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("visible", [1, 2, 3, 5])
def test_forward_is_the_formula_by_loops(normalise, visible):
    layer = made(normalise=normalise)
    layer.grow(copies(0, 2), 7)
    with layer.visible(visible):
        torch.testing.assert_close(layer(inputs()), by_loops(layer, inputs(), visible), rtol=1e-4, atol=1e-5)


def test_the_layer_of_before_is_the_same_bits_with_later_experts_out_of_sight():
    layer, x = made(), inputs()
    with torch.no_grad():
        before = layer(x)
        for round_ in range(4):
            layer.grow(copies(0, 1), round_)
            trained = layer.num_experts
            torch.nn.init.normal_(layer.free_into)
            torch.nn.init.normal_(layer.free_gate, std=5.0)
            now = layer(x)
            layer.freeze()
            assert torch.equal(layer(x), now) and layer.num_free == 0
            layer.grow(copies(1), 9)
            with layer.visible(trained):
                assert torch.equal(layer(x), now)
            layer.drop_free()
        with layer.visible(3):
            assert torch.equal(layer(x), before)
        assert not torch.equal(layer(x), before)


def trained(layer, steps=6):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        layer(inputs(step)).square().mean().backward()
        optimizer.step()
    return layer


def test_frozen_experts_and_gate_rows_keep_every_bit_through_adamw():
    layer = made()
    layer.grow(copies(0, 1))
    old = {name: getattr(layer, name).clone() for name in ("into", "out", "gate")}
    new = {name: getattr(layer, f"free_{name}").clone() for name in old}
    trained(layer)
    for name, value in old.items():
        assert torch.equal(getattr(layer, name), value)
        assert not torch.equal(getattr(layer, f"free_{name}"), new[name])
    assert {name for name, _ in layer.named_parameters()} == {"free_into", "free_out", "free_gate"}


def test_a_masked_gradient_is_no_freezing():
    """The obvious mistake: one parameter whose old rows get no gradient is moved by the optimizer's decay all the same."""
    layer = made()
    whole = torch.nn.Parameter(layer.into.clone())
    whole.register_hook(lambda grad: torch.zeros_like(grad))
    optimizer = torch.optim.AdamW([whole], lr=0.05, weight_decay=0.1)
    whole.sum().backward()
    optimizer.step()
    assert not torch.equal(whole, layer.into)


def test_gradients_are_those_of_the_formula():
    layer = made().double()
    layer.grow(copies(0, 1))
    x = inputs().double()[:1, :6].requires_grad_()
    free = [layer.free_into, layer.free_out, layer.free_gate]

    def forward(x, into, out, gate):
        return torch.func.functional_call(layer, {"free_into": into, "free_out": out, "free_gate": gate}, (x,))

    assert torch.autograd.gradcheck(forward, (x, *free), nondet_tol=0.0, fast_mode=True)


def test_ties_go_to_the_lower_expert_and_fewer_than_k_are_all_used():
    layer = made(top_k=2)
    layer.gate[:] = layer.gate[0]
    assert layer.route(inputs()).routes.expert_ids.unique(dim=0).tolist() == [[0, 1]]
    with layer.visible(1):
        routed = layer.route(inputs())
    assert routed.routes.top_k == 1 and bool((routed.routes.weights == 1).all()) and routed.load.tolist() == [TOKENS]


def test_random_routing_follows_the_tables_and_touches_one_group_only():
    context = GrowthContext()
    layer = made(1, gate=False, context=context)
    ids = torch.randint(0, 50, (2, TOKENS // 2))
    with pytest.raises(ModelError, match="input_ids") as caught, context.use(domain=0):
        layer.add_table(torch.zeros(50))
        layer(inputs())
    assert caught.value.code == "token_ids_needed"
    context.token_ids = ids
    dense = layer(inputs())
    layer.grow(copies(0, 0, 0))
    table = torch.arange(50) % 3 + 1
    with context.use(domain=layer.add_table(table)):
        routed = layer.route(inputs())
        assert routed.routes.expert_ids[:, 0].tolist() == table[ids].flatten().tolist()
        trained(layer)
    layer.freeze()
    assert torch.equal(layer(inputs()), dense)
    with pytest.raises(DispatchError) as caught, context.use(domain=2):
        layer(inputs())
    assert caught.value.code == "domain_unknown"


def test_what_cannot_be_grown_is_refused_before_anything_changes():
    layer = made()
    for slots, code in (([Slot((3,), new=True)], "unknown_expert"), ([Slot((1,))], "bad_plan")):
        with pytest.raises(SurgeryError) as caught:
            layer.grow([*copies(0), *slots])
        assert caught.value.code == code and layer.num_experts == 3
    with pytest.raises(SurgeryError), layer.visible(4):
        pass


def test_a_deep_copy_has_a_context_of_its_own():
    layer = made()
    twin = copy.deepcopy(layer)
    with layer.visible(1):
        assert twin.num_visible == 3 and layer.num_visible == 1


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_go_to_bytes_and_back_bit_for_bit(gated, dtype):
    layer = made(4)
    if not gated:
        layer = GrowingLayer(layer.into[:, :INNER], layer.out, layer.gate, gated=False)
    layer.into, layer.out = layer.into.to(dtype), layer.out.to(dtype)
    values = to_bytes(layer, [3, 1])
    assert values.numel() == sum(2 * units * size for _, units, size in spaces(layer))
    rows, end = from_bytes(layer, torch.cat([values, values]), values.numel(), 2)
    assert end == 2 * values.numel()
    for name, part in rows.items():
        assert torch.equal(part, getattr(layer, name)[[3, 1]])


def test_slots_in_numbers():
    tensor = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3))
    slots = [
        Slot((2,)),
        Slot((0, 1), (0.25, 0.75)),
        Slot((3,), new=True, noise=0.1),
        Slot(new=True),
        Slot((1,), new=True),
    ]
    rows = slot_rows(tensor, slots, "seed")
    assert torch.equal(rows[0], tensor[2]) and torch.equal(rows[4], tensor[1])
    torch.testing.assert_close(rows[1], 0.25 * tensor[0] + 0.75 * tensor[1])
    noise = rows[2] - tensor[3]
    assert 0.02 < float(noise.std() / tensor[3].std()) < 0.3
    assert torch.equal(rows, slot_rows(tensor, slots, "seed")) and not torch.equal(
        rows, slot_rows(tensor, slots, "other")
    )
    state = slot_state(tensor, slots)
    assert torch.equal(state[0], tensor[2]) and not bool(state[1:].any())
