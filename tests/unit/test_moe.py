"""The layer equals a plain loop over tokens, for every kind of expert, and idle experts have a gradient of exactly zero."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moses
from moses import routers
from moses.errors import ConfigError, DispatchError
from moses.experts import ACTIVATIONS, UnevenExperts
from moses.ops import grouped_linear
from moses.routes import RouterOutput, Routes, expert_load

D, E = 8, 6
GOLDEN = [1.2645265, 1.0475867, 0.8888923, 0.7648448, 0.7057482]


class Fixed(torch.nn.Module):
    """Routes as it was told, whatever the input."""

    def __init__(self, ids, weights=None, num_experts=E):
        super().__init__()
        self.ids = torch.as_tensor(ids)
        self.weights = torch.ones(self.ids.shape, dtype=torch.float64) if weights is None else weights
        self.num_experts = num_experts

    def forward(self, x):
        load = expert_load(self.ids, self.num_experts)
        return RouterOutput(Routes(self.ids, self.weights, may_skip=bool((self.ids < 0).any())), None, load)


def layer(seed=0, **settings):
    torch.manual_seed(seed)
    made = moses.MoELayer(D, settings.pop("d_ff", 10), E, 2, **settings).double()
    for parameter in made.experts.parameters():
        torch.nn.init.normal_(parameter)
    return made


def tokens(count=12, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(made, x, routes):
    """Token by token, slot by slot."""
    total = torch.zeros_like(x)
    experts, act = made.experts, ACTIVATIONS[made.experts.activation]
    for token in range(x.shape[0]):
        for expert, weight in zip(routes.expert_ids[token].tolist(), routes.weights[token], strict=True):
            if expert < 0:
                continue
            hidden = experts.into[expert] @ x[token]
            if experts.kind == "gate_up_down":
                gate, up = hidden.chunk(2)
                hidden = act(gate) * up
            elif experts.kind == "up_down":
                hidden = act(hidden)
            total[token] = total[token] + weight * (experts.out[expert] @ hidden)
    return total


@pytest.mark.parametrize("kind", ["gate_up_down", "up_down", "low_rank"])
@pytest.mark.parametrize("d_ff", [10, [3, 10, 1, 4, 7, 2]], ids=["even", "uneven"])
def test_the_layer_is_a_loop_over_tokens(kind, d_ff):
    made, x = layer(d_ff=d_ff, experts=kind, activation="gelu"), tokens().requires_grad_()
    y, output = made(x.view(3, 4, D))
    wanted = by_hand(made, x, output.routes)
    torch.testing.assert_close(y.view(12, D), wanted)
    parameters = [x, *made.parameters()]
    ours = torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(wanted.sin().sum(), parameters, allow_unused=True, materialize_grads=True)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("d_ff", [5, [5] * E])
def test_experts_without_tokens_have_a_gradient_of_exactly_zero(d_ff):
    made = layer(d_ff=d_ff, router=Fixed([[4, 1], [4, 1], [1, 4]]))
    x = tokens(3).requires_grad_()
    made(x)[0].sum().backward()
    gradients = (
        [list(made.experts.into.grad), list(made.experts.out.grad)]
        if d_ff == 5
        else [[p.grad for p in made.experts.into], [p.grad for p in made.experts.out]]
    )
    for part in gradients:
        for expert, gradient in enumerate(part):
            if expert in (1, 4):
                assert gradient.abs().sum() > 0
            else:
                assert gradient is None or (gradient == 0).all()


def test_all_to_one_zero_tokens_and_every_expert():
    one = layer(router=Fixed([[3, 3]] * 5))
    x = tokens(5)
    torch.testing.assert_close(one(x)[0], by_hand(one, x, one.router(x).routes))
    made = layer()
    y, output = made(torch.zeros(0, D, dtype=torch.float64, requires_grad=True))
    assert y.shape == (0, D) and int(output.load.sum()) == 0
    y.sum().backward()
    assert (made.experts.into.grad == 0).all()
    every = moses.MoELayer(D, 4, E, E).double()
    torch.testing.assert_close(every(x)[0], by_hand(every, x, every(x)[1].routes))
    with pytest.raises(ConfigError):
        moses.MoELayer(D, 4, E, E + 1)


def test_slots_that_name_nobody_add_nothing():
    made = layer(
        router=Fixed([[0, -1], [-1, -1], [2, 5]], torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 0.75]]).double())
    )
    x = tokens(3)
    y, output = made(x)
    torch.testing.assert_close(y, by_hand(made, x, output.routes))
    assert (y[1] == 0).all() and output.load.tolist() == [1, 0, 1, 0, 0, 1] and int(output.dropped) == 0


@pytest.mark.parametrize("overflow", ["drop", "pad"])
def test_capacity_drops_the_last_tokens_and_says_how_many(overflow):
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])
    made = layer(router=Fixed(ids), capacity_factor=1.5, overflow=overflow)  # 1.5 · 8 / 6 = 2
    x = tokens(4)
    y, output = made(x)
    kept = Routes(torch.tensor([[0, 1], [0, 1], [-1, 2], [-1, 3]]), output.routes.weights)
    torch.testing.assert_close(y, by_hand(made, x, kept))
    assert int(output.dropped) == 2 and output.load.tolist() == [4, 2, 1, 1, 0, 0]


def test_capacity_with_slots_that_name_nobody():
    made = layer(router=Fixed([[0, -1], [0, -1], [0, -1]]), capacity_factor=1.0)
    x = tokens(3)
    y, output = made(x)
    assert (y[0] != 0).all() and (y[1:] == 0).all() and int(output.dropped) == 2


def test_every_router_serves_the_layer():
    x = tokens(24).requires_grad_()
    for router in (
        routers.DenseRouter(D, E),
        routers.NoisyTopKRouter(D, E),
        routers.GShardRouter(D, E),
        routers.SwitchRouter(D, E),
        routers.TopKRouter(D, E, 3, scoring="sigmoid"),
        routers.ExpertChoiceRouter(D, E),
    ):
        made = layer(router=router)
        torch.manual_seed(4)
        y, output = made(x)
        torch.testing.assert_close(y, by_hand(made, x, output.routes))
        (y.sum() + output.loss).backward()
        assert router.weight.grad.abs().sum() > 0 or isinstance(router, routers.NoisyTopKRouter), router
    made = layer(router=routers.RandomRouter(30, 2, 3))
    y, output = made(x, token_ids=torch.arange(24), domains=1)
    torch.testing.assert_close(y, by_hand(made, x, output.routes))


def test_activation_checkpointing_recomputes_the_same_routes_and_gradients():
    made = layer(router=routers.GShardRouter(D, E))
    gradients = []
    for run in (lambda x: made(x)[0], lambda x: checkpoint(lambda x: made(x)[0], x, use_reentrant=False)):
        torch.manual_seed(9)
        x = tokens(40).requires_grad_()
        made.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in made.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_mixed_autocast_computes_in_bfloat16_and_routes_in_float32():
    made = moses.MoELayer(D, 16, E, 2)
    x = tokens(30).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, output = made(x)
    assert y.dtype == torch.bfloat16 and output.routes.weights.dtype == torch.float32
    assert torch.equal(output.routes.expert_ids, made(x)[1].routes.expert_ids)
    torch.testing.assert_close(y.float(), made(x)[0], rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and made.experts.into.grad.dtype == torch.float32


def test_an_expanded_gradient_and_input_are_taken():
    made = layer()
    x = tokens(1).expand(7, D).requires_grad_()
    y, _ = made(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)  # the gradient of sum is one number, expanded
    torch.testing.assert_close(gradient, torch.autograd.grad(made(x)[0], x, torch.ones(7, D).double())[0])


def test_results_do_not_depend_on_threads():
    made = moses.MoELayer(64, 32, 16, 2)
    x = torch.randn(3000, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(made(x)[1].routes)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(routes.expert_ids, found[0].expert_ids) for routes in found)


def test_the_layer_is_a_plain_module():
    made, x = layer(), tokens()
    y, _ = made(x)
    twin = layer(seed=5)
    twin.load_state_dict(made.state_dict())
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    for other in (twin, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x)[0], y)
    assert made.float()(x.float())[0].dtype == torch.float32
    assert "gate_up_down" in repr(made) and "num_experts=6" in repr(made)


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_the_layer_is_traced_without_a_graph_break(capacity):
    made, x = layer(capacity_factor=capacity), tokens()
    compiled = torch.compile(lambda x: made(x)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x)[0])
    compiled(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"d_ff": 0},
        {"d_ff": []},
        {"d_ff": [4, -1]},
        {"d_ff": True},
        {"experts": "conv"},
        {"activation": "sine"},
        {"capacity_factor": 0.0},
        {"capacity_factor": float("nan")},
        {"overflow": "pad"},
        {"overflow": "wait", "capacity_factor": 1.0},
        {"router": routers.TopKRouter(D, E + 1)},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError) as caught:
        moses.MoELayer(D, **({"d_ff": 4, "num_experts": E} | settings))
    assert caught.value.code == "bad_setting"


def test_a_router_that_names_an_expert_that_is_not_there_is_an_error():
    with pytest.raises(DispatchError, match="token 1, slot 0 names expert 6"):
        layer(router=Fixed([[0, 1], [6, 0]]))(tokens(2))


def case(seed=0, experts=4, rows=9):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, 3, 3, 7, 8])
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, weight, offsets


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_is_a_product_an_expert(transposed):
    x, weight, offsets = case()
    given = weight.transpose(1, 2) if transposed else weight
    y = grouped_linear(x, given, offsets, transposed)
    for expert, (start, end) in enumerate([(0, 3), (3, 3), (3, 7), (7, 8)]):
        torch.testing.assert_close(y[start:end], x[start:end] @ weight[expert].T)
    assert (y[8:] == 0).all(), "rows that are nobody's"
    assert torch.autograd.gradcheck(
        lambda x, w: grouped_linear(x, w, offsets, transposed), (x, given.detach().requires_grad_())
    )
    assert torch.autograd.gradgradcheck(
        lambda x, w: grouped_linear(x, w, offsets, transposed), (x, given.detach().requires_grad_())
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_ops_pass_opcheck():
    x, weight, offsets = case()
    torch.library.opcheck(torch.ops.moses.grouped_linear.default, (x, weight, offsets, False))
    left, right = torch.randn(9, 3, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.moses.grouped_outer.default, (left, right, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_idle_experts_and_nobodys_rows_are_never_garbage(dtype):
    x, weight, offsets = case()
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    for _ in range(3):  # fresh memory often holds zeros by luck
        junk = torch.full((1 << 16,), float("nan"))
        del junk
        y = grouped_linear(x, weight, offsets)
        y.sum().backward()
        assert (y[8:] == 0).all() and (weight.grad[1] == 0).all() and (x.grad[8:] == 0).all()
        x.grad = weight.grad = None


def test_grouped_linear_says_what_does_not_fit():
    x, weight, offsets = case()
    for bad in (
        (x, weight, offsets[:-1]),
        (x[:, :4], weight, offsets),
        (x.float(), weight, offsets),
        (x[0], weight, offsets),
    ):
        with pytest.raises(DispatchError):
            grouped_linear(*bad)
    assert isinstance(layer(d_ff=[1] * E).experts, UnevenExperts)


def test_a_training_run_keeps_its_losses():
    torch.manual_seed(0)
    made = moses.MoELayer(16, 32, 8, 2)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        y, output = made(x)
        loss = (y - target).square().mean() + output.loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN, rel=1e-4)
