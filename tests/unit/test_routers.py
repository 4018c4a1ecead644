"""Every rule equals its paper's formula, token by token, in float32 whatever the model computes in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moses import routers
from moses.context import Group, TaskContext
from moses.errors import ConfigError, DispatchError, ModelError
from moses.loss import balance_loss, importance_loss, squared_variation, z_loss
from moses.moe import MoELayer
from moses.plan import dispatch_plan
from moses.routers.capacity import first_come, first_come_reference
from moses.routers.dense import dense_reference
from moses.routers.expert_choice import expert_choice_reference
from moses.routers.finite import check_finite
from moses.routers.gate import gate_logits
from moses.routers.gshard import gshard_reference
from moses.routers.noisy_topk import smooth_load, smooth_load_reference
from moses.routers.random import draw_table
from moses.routers.switch import switch_loss_reference
from moses.routers.topk import topk_reference
from moses.routers.topk_of import stable_topk
from moses.routes import RouterOutput, Routes, expert_capacity, expert_load

D, E = 6, 8
MAKERS = {
    "dense": lambda: routers.DenseRouter(D, E),
    "noisy": lambda: routers.NoisyTopKRouter(D, E, 2),
    "gshard": lambda: routers.GShardRouter(D, E),
    "switch": lambda: routers.SwitchRouter(D, E),
    "topk": lambda: routers.TopKRouter(D, E, 3, z_weight=1e-3),
    "topk_after": lambda: routers.TopKRouter(D, E, 3, scoring="softmax_after"),
    "sigmoid": lambda: routers.TopKRouter(D, E, 2, scoring="sigmoid", bias=True, num_groups=4, top_groups=2, scale=2.5),
    "choice": lambda: routers.ExpertChoiceRouter(D, E),
    "gshard_full": lambda: routers.GShardRouter(D, E, capacity_factor=1.0),
    "switch_full": lambda: routers.SwitchRouter(D, E, capacity_factor=1.25, jitter=0.1),
}
# wide enough for the BLAS to split its sums between threads
WIDE = {
    "noisy": lambda width: routers.NoisyTopKRouter(width, 64, 2),
    "topk": lambda width: routers.TopKRouter(width, 64, 8),
    "choice": lambda width: routers.ExpertChoiceRouter(width, 64),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    router = MAKERS[name]()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def tokens(count=20, seed=1, dtype=torch.float32):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pairs(routes):
    return [
        list(zip(ids, ws, strict=True))
        for ids, ws in zip(routes.expert_ids.tolist(), routes.weights.tolist(), strict=True)
    ]


def assert_routes(found, wanted, tolerance=1e-6):
    assert [[expert for expert, _ in row] for row in found] == [[expert for expert, _ in row] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert [w for _, w in row] == pytest.approx([w for _, w in other], rel=tolerance)


def test_dense_is_the_softmax_over_all():
    router = made("dense")
    output = router(tokens())
    torch.testing.assert_close(output.routes.weights, torch.tensor(dense_reference(output.logits.tolist())))
    assert output.routes.expert_ids.tolist() == [list(range(E))] * 20


@pytest.mark.parametrize("scoring", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_topk_equals_its_reference(scoring, normalise, groups, bias):
    torch.manual_seed(3)
    router = routers.TopKRouter(
        D, E, 3, scoring=scoring, normalise=normalise, scale=1.5, bias=bias, num_groups=groups[0], top_groups=groups[1]
    )
    if bias:
        router.bias.copy_(torch.randn(E))
    output = router(tokens(dtype=torch.float64))
    wanted = topk_reference(
        output.logits.tolist(), 3, scoring, normalise, 1.5, router.bias.tolist() if bias else None, *groups
    )
    assert_routes(pairs(output.routes), wanted, 1e-12)


def test_gshard_equals_its_reference():
    router = made("gshard")
    torch.manual_seed(5)
    output = router(tokens(200))
    torch.manual_seed(5)
    draws = torch.rand(200).tolist()
    assert_routes(pairs(output.routes), gshard_reference(output.logits.softmax(-1).tolist(), draws), 1e-5)
    # the load of its loss is that of first choices, which is Switch's
    loss = 0.01 * switch_loss_reference(output.logits.softmax(-1).tolist())
    assert output.losses["balance"].item() == pytest.approx(loss, rel=1e-5)
    assert (output.routes.expert_ids[:, 1] == -1).any() and (output.routes.expert_ids[:, 1] >= 0).any()
    assert int(output.load.sum()) == int((output.routes.expert_ids >= 0).sum())
    still = router.eval()(tokens(200))
    assert (still.routes.expert_ids >= 0).all() and not still.routes.may_skip


def test_switch_weighs_by_the_probability_and_its_loss_is_the_papers():
    output = made("switch")(tokens(dtype=torch.float64))
    probabilities = output.logits.softmax(-1)
    assert torch.equal(output.routes.weights[:, 0], probabilities.max(-1).values)
    assert output.losses["balance"].item() == pytest.approx(
        0.01 * switch_loss_reference(probabilities.tolist()), rel=1e-12
    )


def test_noisy_topk_routes_and_losses_are_the_papers():
    router = made("noisy").double()
    x = tokens(30, dtype=torch.float64)
    torch.manual_seed(7)
    output = router(x)
    torch.manual_seed(7)
    spread = torch.nn.functional.softplus(x @ router.noise_weight.T).detach()
    noisy = output.logits + torch.randn_like(output.logits) * spread
    assert_routes(pairs(output.routes), topk_reference(noisy.tolist(), 2, "softmax_after"), 1e-12)
    gates = torch.zeros(30, E, dtype=torch.float64).scatter(1, output.routes.expert_ids, output.routes.weights)
    assert output.losses["importance"].item() == pytest.approx(0.1 * squared_variation(gates.sum(0)).item(), rel=1e-12)
    load = smooth_load_reference(output.logits.tolist(), noisy.tolist(), spread.tolist(), 2)
    assert smooth_load(output.logits, noisy, spread, 2).tolist() == pytest.approx(load, rel=1e-9)
    assert output.losses["load"].item() == pytest.approx(
        0.1 * float(squared_variation(torch.tensor(load, dtype=torch.float64))), rel=1e-9
    )
    quiet = router.eval()(x)
    assert torch.equal(quiet.routes.expert_ids, stable_topk(quiet.logits, 2)[1]) and "load" not in quiet.losses


def test_losses_on_cases_worked_out_by_hand():
    even = torch.full((4, 2), 0.5)
    assert float(balance_loss(even, torch.tensor([2, 2]))) == pytest.approx(1.0)
    # f = (1, 0), P = (0.75, 0.25): 2 · 0.75
    assert float(balance_loss(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([4, 0]))) == pytest.approx(1.5)
    # importance (3, 1): mean 2, variance 1, CV² = 1/4
    assert float(importance_loss(torch.tensor([[0.75, 0.25]] * 4))) == pytest.approx(0.25)
    # two equal logits of 0: log 2
    assert float(z_loss(torch.zeros(3, 2))) == pytest.approx(math.log(2) ** 2)


def test_expert_choice_fills_every_expert_with_its_best():
    output = made("choice")(tokens(20))
    wanted = expert_choice_reference(output.logits.softmax(-1).tolist(), 5)
    plan = output.plan
    chosen = (plan.order.view(E, 5) // E).tolist()
    assert chosen == [sorted(taken) for taken in wanted] and output.load.tolist() == [5] * E
    assert ((output.routes.expert_ids >= 0) == (output.routes.weights > 0)).all()
    # the plan is the one that dispatch_plan makes of the routes, the pairs of nobody left out
    ids = output.routes.expert_ids
    same = dispatch_plan(torch.where(ids < 0, E, ids)[:, : E + 1], E + 1)
    rows = int(same.offsets[E])
    assert torch.equal(plan.order, same.order[:rows]) and torch.equal(plan.offsets, same.offsets[: E + 1])
    assert torch.equal(plan.inverse, torch.where(same.inverse < rows, same.inverse, -1))


def test_random_routes_by_token_and_domain():
    router = routers.RandomRouter(50, 3, 4, seed=1, layer="a")
    ids = torch.arange(50)
    output = router(torch.zeros(50, D), ids, 2)
    assert set(output.routes.expert_ids.flatten().tolist()) <= {8, 9, 10, 11}
    assert torch.equal(router.table, routers.RandomRouter(50, 3, 4, seed=1, layer="a").table)
    assert not torch.equal(router.table, routers.RandomRouter(50, 3, 4, seed=1, layer="b").table)
    domains = torch.arange(50) % 3
    mixed = router(torch.zeros(50, D), ids, domains).routes.expert_ids[:, 0]
    assert torch.equal(mixed // 4, domains)
    with pytest.raises(DispatchError, match="token 1 has domain 3"):
        router(torch.zeros(2, D), torch.tensor([0, 1]), torch.tensor([0, 3]))
    with pytest.raises(DispatchError, match="token 0 has token 50"):
        router(torch.zeros(1, D), torch.tensor([50]), 0)


def test_a_balanced_table_shares_a_zipf_vocabulary_evenly():
    counts = (1e6 / torch.arange(1, 2001)).long()
    table = draw_table(2000, 8, 0, counts)
    load = torch.zeros(8, dtype=torch.int64).scatter_add(0, table, counts).double()
    # the most frequent id alone may be more than a share; here the largest is 1/8.2 of all
    assert float(load.std(correction=0) / load.mean()) < 0.01
    uniform = draw_table(2000, 8, 0)
    spread = torch.zeros(8, dtype=torch.int64).scatter_add(0, uniform, counts).double()
    assert float(spread.std(correction=0) / spread.mean()) > 0.2


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_routed_in_float32_also_under_autocast(name):
    router = made(name).eval()
    x = tokens(100).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x)
    wide = router(x.float())
    assert found.logits.dtype == found.routes.weights.dtype == torch.float32
    assert torch.equal(found.routes.expert_ids, wide.routes.expert_ids) and torch.equal(
        found.routes.weights, wide.routes.weights
    )
    assert made(name).double().eval()(x.double()).routes.weights.dtype == torch.float64


@pytest.mark.parametrize("name", MAKERS)
def test_weights_have_gradients(name):
    router = made(name).double()  # in training: noise, draws and the losses that need them

    def run(x, *parameters):
        torch.manual_seed(6)
        names = [name for name, _ in router.named_parameters()]
        output = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,))
        return (output.routes.weights, *output.losses.values())

    inputs = [tokens(5, dtype=torch.float64), *(p.detach().clone() for p in router.parameters())]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs], fast_mode=True)
    assert name in ("dense", "choice") or len(run(*inputs)) > 1


@pytest.mark.parametrize("name", MAKERS)
def test_zero_tokens_and_any_leading_shape(name):
    router = made(name).eval()
    empty = router(torch.zeros(0, D))
    assert empty.routes.num_tokens == 0 and int(empty.load.sum()) == 0 and math.isfinite(empty.loss.item())
    x = tokens(12)
    assert torch.equal(router(x.view(3, 4, D)).routes.expert_ids, router(x).routes.expert_ids)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_the_token(name, bad):
    x = tokens(9)
    x[4, 2] = bad
    with pytest.raises(ModelError, match="token 4") as caught:
        made(name)(x)
    assert caught.value.code == "router_not_finite"


@pytest.mark.parametrize("name", ["noisy", "gshard", "gshard_full", "switch_full"])
def test_recomputing_under_activation_checkpointing_routes_alike(name):
    router = made(name)
    seen = []

    def layer(x):
        output = router(x)
        seen.append(output.routes.expert_ids)
        return output.routes.weights.sum(-1, keepdim=True) * x

    checkpoint(layer, tokens(60).requires_grad_(), use_reentrant=False).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("name", ["noisy", "gshard_full", "switch_full", "topk_after", "sigmoid", "choice"])
def test_routers_are_traced_without_a_graph_break(name):
    torch.compiler.reset()
    router = made(name)  # in training, noise and draws included
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (20, 33):
        found, gradients = [], []
        for call in (router, compiled):
            x = tokens(count).requires_grad_()
            torch.manual_seed(2)
            output = call(x)
            (output.loss + (output.routes.weights**2).sum()).backward()
            found.append(output)
            gradients.append(x.grad)
        eager, traced = found
        assert torch.equal(traced.routes.expert_ids, eager.routes.expert_ids)
        assert torch.equal(traced.routes.weights, eager.routes.weights)
        assert torch.equal(traced.load, eager.load) and dict(traced.losses) == dict(eager.losses)
        assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    with pytest.raises(ModelError, match="token 3"):
        compiled(tokens(9).index_fill(0, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize("name", WIDE)
def test_routes_do_not_depend_on_threads(name):
    torch.manual_seed(0)
    router = WIDE[name](1024).eval()
    x = torch.randn(333, 1024)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4, 16):
            torch.set_num_threads(threads)
            found.append(router(x).routes)
        assert all(
            torch.equal(r.expert_ids, found[0].expert_ids) and torch.equal(r.weights, found[0].weights) for r in found
        )
    finally:
        torch.set_num_threads(before)


def test_the_bias_balances_a_skewed_input_without_a_loss():
    torch.manual_seed(0)
    router = routers.TopKRouter(D, E, 2, bias=True, balance_weight=0.0)
    x = torch.randn(2000, D) + 2.0 * router.weight[0].detach()
    first = router(x)
    for _ in range(400):
        router.update_bias(router(x).load, rate=0.01)
    last = router(x)
    assert not last.losses and float(first.load_variation) > 0.8 and float(last.load_variation) < 0.2
    with pytest.raises(ConfigError):
        routers.TopKRouter(D, E).update_bias(last.load)


@pytest.mark.parametrize(
    "make",
    [
        lambda: routers.TopKRouter(D, 4, 5),
        lambda: routers.TopKRouter(D, 0, 1),
        lambda: routers.TopKRouter(D, 8, 2, scoring="cosine"),
        lambda: routers.TopKRouter(D, 8, 2, num_groups=3),
        lambda: routers.TopKRouter(D, 8, 5, num_groups=4, top_groups=2),
        lambda: routers.TopKRouter(D, 8, 2, z_weight=float("nan")),
        lambda: routers.GShardRouter(D, 1),
        lambda: routers.SwitchRouter(D, 4, jitter=1.0),
        lambda: routers.NoisyTopKRouter(D, 4, 2, load_weight=-1.0),
        lambda: routers.ExpertChoiceRouter(D, 4, 5.0),
        lambda: routers.RandomRouter(10, 0, 2),
        lambda: routers.RandomRouter(10, 1, 2, frequencies=[torch.full((10,), float("nan"))]),
        lambda: routers.TopKRouter(True, 8, 2),
        lambda: routers.SwitchRouter(D, 4, capacity_factor=0.0),
        lambda: routers.GShardRouter(D, 4, capacity_factor=float("inf")),
        lambda: routers.RandomRouter(10, 2, 2, frequencies=[torch.ones(9), None]),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.code == "bad_setting"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_ops_pass_opcheck():
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 5), (4, 5), (4,))
    )
    for inputs in ((x, weight, bias), (x, weight, None), (x[0], weight, None)):
        torch.library.opcheck(torch.ops.moses.gate.default, (*inputs, "a"))
    assert torch.autograd.gradcheck(gate_logits, (x, weight, bias)) and torch.autograd.gradgradcheck(
        gate_logits, (x, weight, bias)
    )
    torch.library.opcheck(torch.ops.moses.finite_logits.default, (torch.randn(3, 4, requires_grad=True), "a"))
    for top_k in (1, 3, 6, 9):
        torch.library.opcheck(torch.ops.moses.topk.default, (torch.randn(3, 5, 9), top_k))
    assert torch.autograd.gradcheck(
        lambda x: stable_topk(x, 3)[0], torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    )
    assert torch.autograd.gradcheck(check_finite, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", MAKERS)
def test_routers_meet_the_checks_of_registered_ops(name):
    """Fake, eager and traced runs of a router agree, as opcheck asks it of an op."""
    router, x = made(name).eval(), tokens()
    on_meta = made(name).to("meta")(x.to("meta"))
    output = router(x)
    for real, fake in ((output.routes.expert_ids, on_meta.routes.expert_ids), (output.load, on_meta.load)):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    assert on_meta.loss.is_meta


def test_saved_routes_are_used_where_recomputed_ones_would_differ():
    """The gate changes between forward and recompute: saved routes stay, recomputed ones follow the new gate."""
    found = {}
    for how, context_fn in (("saved", routers.save_routes), ("recomputed", None)):
        router, seen = made("topk"), []

        def layer(x, router=router, seen=seen):
            output = router(x)
            seen.append(output.routes.expert_ids)
            return output.routes.weights.sum(-1, keepdim=True) * x

        y = checkpoint(
            layer,
            tokens(60).requires_grad_(),
            use_reentrant=False,
            **({"context_fn": context_fn} if context_fn else {}),
        )
        router.weight.data.neg_()
        y.sum().backward()
        found[how] = torch.equal(*seen)
    assert found == {"saved": True, "recomputed": False}


def test_capacity_is_exact():
    assert expert_capacity(100, 1, 10, 1.1) == 11  # in floats 1.1 · 100 / 10 is above 11
    assert (
        expert_capacity(7, 2, 4, 1.0) == 4 and expert_capacity(0, 2, 4, 2.0) == 1 and expert_capacity(8, 2, 4, 0.3) == 2
    )


def test_all_first_choices_come_before_second_ones():
    ids = [[1, 0], [0, 1], [0, 1], [0, 2]]
    kept = [[True, False], [True, True], [True, False], [False, True]]
    assert first_come(torch.tensor(ids), 3, 2).tolist() == kept == first_come_reference(ids, 3, 2)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=20), st.integers(1, 6))
def test_first_come_equals_its_reference(ids, capacity):
    assert first_come(torch.tensor(ids), 4, capacity).tolist() == first_come_reference(ids, 4, capacity)


@pytest.mark.parametrize("name", ["gshard_full", "switch_full"])
def test_a_full_expert_drops_the_rest_and_says_how_many(name):
    router = made(name)
    x = tokens(64) + 3.0 * router.weight[0].detach()
    torch.manual_seed(4)
    output = router(x)
    router.capacity_factor = None
    torch.manual_seed(4)
    free = router(x)
    ids, weights = output.routes.expert_ids, output.routes.weights
    kept = ids >= 0
    assert torch.equal(ids[kept], free.routes.expert_ids[kept]) and torch.equal(
        weights[kept], free.routes.weights[kept]
    )
    assert not weights[~kept].any() and torch.equal(output.load, free.load) and output.routes.may_skip
    assert int(expert_load(ids, E).max()) == expert_capacity(
        64, ids.shape[1], E, 1.0 if name == "gshard_full" else 1.25
    )
    assert int(output.dropped) == int(free.load.sum() - kept.sum()) > 0
    assert float(output.dropped_fraction) == pytest.approx(int(output.dropped) / int(free.load.sum()))
    assert float(free.dropped_fraction) == 0.0


def test_switch_jitters_its_input_in_training_alone():
    router, x = made("switch"), tokens(50)
    router.jitter = 0.3
    torch.manual_seed(1)
    noisy = router(x)
    torch.manual_seed(1)
    factor = 1.0 + 0.3 * (2.0 * torch.rand(50, D) - 1.0)
    assert torch.equal(noisy.logits, router.eval()(x * factor).logits)


def test_losses_stay_finite_where_scores_or_noise_underflow():
    sigmoid = routers.TopKRouter(D, E, 2, scoring="sigmoid")
    noisy = routers.NoisyTopKRouter(D, E, 2)
    with torch.no_grad():
        sigmoid.weight.fill_(-100.0)
        noisy.noise_weight.fill_(-100.0)
    for router in (sigmoid, noisy):
        output = router(torch.ones(4, D))
        output.loss.backward()
        assert output.loss.isfinite() and output.routes.weights.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_the_variation_of_few_tokens_over_many_experts_is_exact():
    values = torch.zeros(4096).index_fill(0, torch.tensor([7]), 1.0)
    assert float(squared_variation(values)) == pytest.approx(4095.0, rel=1e-5)
    assert float(squared_variation(torch.zeros(5))) == 0.0


def test_the_bias_stays_float32_when_the_model_is_cast():
    router = routers.TopKRouter(D, E, 2, bias=True)
    router.update_bias(torch.arange(E), 1e-3)
    before = router.bias.clone()
    assert router.half().weight.dtype == torch.float16
    assert router.bias.dtype == torch.float32 and torch.equal(router.bias, before)
    assert router.double().bias.dtype == torch.float64


def test_ids_never_seen_are_spread_over_a_balanced_table():
    counts = torch.cat([torch.full((1000,), 10**12), torch.zeros(1000, dtype=torch.int64)])
    table = draw_table(2000, 8, 0, counts)
    assert torch.bincount(table[1000:], minlength=8).tolist() == [125] * 8
    assert torch.bincount(table[:1000], minlength=8).tolist() == [125] * 8


def test_task_router_routes_each_row_for_its_task():
    context = TaskContext()
    router = routers.TaskRouter("block", D, 3, 2, None, seed=1, context=context)
    for task in (0, 1):
        router.open(task)
        router.close(task)
        router.grow(router.num_experts + 1)
    x = torch.randn(4, 3, D)
    context.counts = {}
    with context.use((Group(0, torch.tensor([0, 2])), Group(1, torch.tensor([3])))):
        output, gates = router(x), router.gates(x)
    counts = {key: value.tolist() for key, value in context.counts.items()}
    ids, weights = output.routes.expert_ids.view(4, 3, 2), output.routes.weights.view(4, 3, 2)
    assert (ids[1] == -1).all() and not weights[1].any() and output.routes.may_skip
    for rows, task, part in (([0, 2], 0, gates[0]), ([3], 1, gates[1])):
        dense = torch.zeros(len(rows), 3, 5).scatter(-1, ids[rows], weights[rows])
        assert torch.equal(dense[..., : part.shape[-1]], part)
        alone = router.route(x[rows].reshape(-1, D), task)
        assert torch.equal(ids[rows].view(-1, 2), alone.routes.expert_ids)
        assert sum(counts[task, "block"]) == 2 * 2 * 3 * len(rows)
        known = output.logits.view(4, 3, 5)[rows][..., : part.shape[-1]].reshape(-1, part.shape[-1])
        assert torch.equal(known, alone.logits)
    assert int(output.load.sum()) == 18


def test_a_layer_takes_a_routers_own_capacity_and_the_tasks_routes():
    torch.manual_seed(0)
    layer = MoELayer(D, 4, E, router=made("gshard_full"))
    torch.manual_seed(3)
    _, output = layer(tokens(40))
    torch.manual_seed(3)
    alone = layer.router(tokens(40))
    assert int(output.dropped) == int(alone.dropped) > 0
    context = TaskContext(open_task=0)
    router = routers.TaskRouter("block", D, E, 2, None, seed=1, context=context)
    router.open(0)
    layer, x = MoELayer(D, 4, E, router=router), torch.randn(3, 2, D)
    with context.use((Group(0, torch.tensor([2])),)):
        y, output = layer(x)
    assert not y[:2].any() and y[2].any() and int(output.load.sum()) == 4 and int(output.dropped) == 0
    y.sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("top_k", [2, 5])
def test_more_experts_than_16_bits_and_input_of_any_strides(top_k):
    torch.manual_seed(0)
    router = routers.TopKRouter(D, 70_000, top_k)
    one = torch.randn(D)
    with torch.no_grad():
        router.weight[69_999] = one
    output = router(one.expand(3, D))
    assert output.routes.expert_ids[:, 0].tolist() == [69_999] * 3 and output.load.shape == (70_000,)
    x = torch.randn(D, 40).T
    assert torch.equal(router(x).routes.expert_ids, router(x.contiguous()).routes.expert_ids)


def test_outputs_are_immutable_and_say_what_they_are():
    output = made("topk")(tokens())
    with pytest.raises(AttributeError):
        output.routes = None
    with pytest.raises(TypeError):
        output.losses["more"] = torch.zeros(())
    assert "num_experts=8" in repr(output) and "balance, z" in repr(output) and "top_k=3" in repr(output.routes)
    assert isinstance(output, RouterOutput)
    assert expert_load(torch.tensor([[0, -1], [0, 2]]), 3).tolist() == [2, 0, 1]
    with pytest.raises(DispatchError):
        Routes(torch.zeros(2, 2), torch.zeros(2, 2))
