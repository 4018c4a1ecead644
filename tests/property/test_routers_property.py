"""What holds of every router on any input: ties, sums, order of tokens and experts, and the same result again and again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moses import routers
from moses.routers.topk_of import _ranked, stable_topk, topk_reference
from moses.routes import expert_load

D = 4
RULES = {
    "dense": lambda experts, k: routers.DenseRouter(D, experts),
    "noisy": lambda experts, k: routers.NoisyTopKRouter(D, experts, k),
    "gshard": lambda experts, k: routers.GShardRouter(D, max(2, experts)),
    "switch": lambda experts, k: routers.SwitchRouter(D, experts),
    "softmax": lambda experts, k: routers.TopKRouter(D, experts, k),
    "softmax_after": lambda experts, k: routers.TopKRouter(D, experts, k, scoring="softmax_after"),
    "sigmoid": lambda experts, k: routers.TopKRouter(D, experts, k, scoring="sigmoid", bias=True, scale=2.5),
    "choice": lambda experts, k: routers.ExpertChoiceRouter(D, experts, float(k)),
}
SUM = {"sigmoid": 2.5}  # of a token's weights; the rest sums to 1
by_rule = pytest.mark.parametrize("rule", RULES)


def whole_router(rule, experts, k, seed):
    """A router with whole weights: whole inputs make exact logits, with many ties."""
    router = RULES[rule](experts, k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
        if getattr(router, "bias", None) is not None:
            router.bias.copy_(torch.randint(-1, 2, router.bias.shape, generator=generator))
    return router.eval()


def whole_tokens(count, seed):
    return torch.randint(-1, 2, (count, D), generator=torch.Generator().manual_seed(seed)).float()


cases = given(
    experts=st.integers(1, 12), share=st.floats(0.01, 1.0), count=st.integers(0, 30), seed=st.integers(0, 2**31)
)


@given(
    data=st.data(),
    experts=st.integers(1, 24),
    rows=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_topk_takes_the_lower_id_among_equals(data, experts, rows, dtype):
    top_k = data.draw(st.integers(1, experts))
    scores = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-38, -1e-45, 1.0, 3e38])
    values = data.draw(st.lists(scores, min_size=experts * rows, max_size=experts * rows))
    table = torch.tensor(values, dtype=dtype).view(rows, experts)
    found, ids = stable_topk(table, top_k)
    wanted = [topk_reference(row, top_k) for row in table.tolist()]
    assert ids.tolist() == wanted
    assert torch.equal(found, table.gather(-1, ids))
    # the path of devices that may not wait, on the CPU
    assert not rows or _ranked(table, top_k).tolist() == wanted


@by_rule
@cases
@settings(max_examples=25)
def test_weights_sum_to_one_ids_are_distinct_and_load_counts_them(rule, experts, share, count, seed):
    k = max(1, round(share * experts))
    router = whole_router(rule, experts, k, seed)
    output = router(whole_tokens(count, seed + 1))
    ids, weights = output.routes.expert_ids, output.routes.weights
    assert weights.dtype == torch.float32 and ids.shape == weights.shape and (weights >= 0).all()
    assert torch.equal(output.load, expert_load(ids, router.num_experts))
    if rule == "choice":
        assert len(set(output.load.tolist())) == 1  # every expert is as full as any
        return
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    if rule == "switch" or (rule in ("softmax", "sigmoid") and router.top_k == 1):
        assert (weights <= SUM.get(rule, 1.0)).all()
    else:
        torch.testing.assert_close(weights.sum(-1), torch.full((count,), SUM.get(rule, 1.0)))


@by_rule
@cases
@settings(max_examples=25)
def test_a_token_is_routed_alike_wherever_it_stands(rule, experts, share, count, seed):
    router = whole_router(rule, experts, max(1, round(share * experts)), seed)
    # Expert choice breaks ties by the order of tokens, so its tokens are made all different.
    x = torch.randn(count, D) if rule == "choice" else whole_tokens(count, seed + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 2))
    whole, moved = router(x).routes, router(x[order]).routes
    if rule == "choice":
        # A product of matrices may round a row by its place.
        torch.testing.assert_close(moved.weights, whole.weights[order], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(moved.expert_ids, whole.expert_ids[order])
        torch.testing.assert_close(moved.weights, whole.weights[order], rtol=1e-6, atol=0)


@by_rule
@given(experts=st.integers(2, 12), count=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_experts_that_change_places_take_their_tokens_along(rule, experts, count, seed):
    generator = torch.Generator().manual_seed(seed)
    router = RULES[rule](experts, 2).eval().double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(count, D, dtype=torch.float64, generator=generator)
    before = router(x)
    order = torch.randperm(router.num_experts, generator=generator)
    for parameter in router.parameters():
        parameter.data = parameter.data[order]
    after = router(x)

    def dense(routes):
        room = torch.zeros(count, router.num_experts + 1, dtype=torch.float64)
        return room.scatter(1, routes.expert_ids % (router.num_experts + 1), routes.weights)[:, :-1]

    torch.testing.assert_close(dense(after.routes), dense(before.routes)[:, order], rtol=1e-9, atol=1e-12)
    assert torch.equal(after.load, before.load[order])
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-9, atol=1e-12)


@by_rule
@given(count=st.integers(1, 300), seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_the_same_bits_again_and_for_any_number_of_threads(rule, count, seed):
    router = whole_router(rule, 16, 3, seed).train()
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 16, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(seed)
            found.append(router(x))
    finally:
        torch.set_num_threads(before)
    for output in found[1:]:
        assert torch.equal(output.routes.expert_ids, found[0].routes.expert_ids)
        assert torch.equal(output.routes.weights, found[0].routes.weights)
        assert torch.equal(output.loss, found[0].loss)


@by_rule
@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=15)
def test_half_precision_is_routed_as_its_float32_values_are(rule, count, seed, dtype):
    router = whole_router(rule, 16, 3, seed).to(dtype)
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = router(x)
    full = router.float()(x.float())
    assert half.routes.weights.dtype == torch.float32
    assert torch.equal(half.routes.expert_ids, full.routes.expert_ids)
    assert torch.equal(half.routes.weights, full.routes.weights) and torch.equal(half.loss, full.loss)
