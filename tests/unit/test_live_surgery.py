"""Surgery on models in memory: what stays keeps its bits and its state in the optimizer, and what is wrong changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import moses
from moses.errors import SurgeryError
from moses.growth.apply import apply
from moses.growth.growing import GrowingLayer
from moses.growth.live import model_bytes
from moses.growth.mixtures import mixtures
from moses.growth.usage import measure_use
from moses.moe import MoELayer
from moses.routers import TopKRouter
from moses.surgery.plan import LayerSurgery, Slot, SurgeryPlan, keep

WIDE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SMALL = WIDE | MLA | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1}
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**WIDE, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **WIDE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **WIDE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "olmoe": lambda: hf.OlmoeConfig(**WIDE, num_experts=6, num_experts_per_tok=2),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **SMALL, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **SMALL, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **WIDE, num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=16
    ),
}
# whose weights do not depend on experts that a token does not use
LOCAL = ("deepseek_v3", "gpt_oss", "softmax_after", "biased", "growing")


class Stack(nn.Module):
    """Two of moses's own layers in a model of one's own."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(61, 32)
        self.blocks = nn.ModuleList(self.layer(kind) for _ in range(2))
        self.head = nn.Linear(32, 61)

    @staticmethod
    def layer(kind):
        if kind == "growing":
            layer = GrowingLayer(torch.randn(2, 96, 32) * 0.2, torch.randn(2, 32, 48) * 0.1, torch.randn(2, 32) * 0.2)
            layer.grow([Slot(new=True)] * 4, kind)
            return layer
        scoring = "sigmoid" if kind == "biased" else "softmax_after"
        return MoELayer(32, 48, 6, router=TopKRouter(32, 6, 2, scoring=scoring, bias=kind == "biased"))

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            y = block(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        logits = self.head(x)
        loss = (
            None
            if labels is None
            else nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def make(family):
    torch.manual_seed(0)
    if family in CONFIGS:
        return hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).train()
    return Stack(family).train()


def batch(rows=2, tokens=9, seed=1):
    ids = torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def optimizer_of(model):
    # the eps keeps the last bits of a gradient near 0 from being a step of full length
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)


def step(model, optimizer, given):
    loss = model(**given).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trained(family, given, steps=2):
    model = make(family)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        step(model, optimizer, given)
    return model, optimizer


def twin(model, optimizer):
    other = copy.deepcopy(model)
    other_optimizer = optimizer_of(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, other_optimizer


def kept_rows(model, before, kept):
    """(name, now, then) of every parameter, of experts those that were kept."""
    then = dict(before.named_parameters())
    for name, now in model.named_parameters():
        old = then[name]
        if now.shape != old.shape:
            block = next(block for block in kept if name.startswith(block + "."))
            places, sources = zip(*kept[block].items(), strict=True)
            yield name, now[list(places)], old[list(sources)]
        else:
            yield name, now, old


EVERY = (*CONFIGS, "softmax_after", "biased", "growing")


@pytest.mark.parametrize("family", EVERY)
def test_state_of_what_stays_is_carried_over_and_new_rows_start_from_nothing(family):
    model, optimizer = trained(family, batch())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
    groups = len(optimizer.param_groups[0]["params"])
    plan = moses.grow(model, add=2, source=3, noise=0.1, optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == groups
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) <= set(model.parameters())
    changed = 0
    for name, now in model.named_parameters():
        old = before[name]
        assert torch.equal(now[: old.shape[0]], old)
        for key, value in states.get(name, {}).items():
            moved = optimizer.state[now][key]
            if value.shape == old.shape and value.ndim:
                assert torch.equal(moved[: old.shape[0]], value) and not bool(moved[old.shape[0] :].any())
                changed += now.shape != old.shape
            else:
                assert torch.equal(moved, value)
    assert changed and len(plan.layers) == len(mixtures(model))
    step(model, optimizer, batch())
    report = moses.prune(model, experts=[0, 7] if family != "growing" else [7], optimizer=optimizer)
    assert report.bytes_after < report.bytes_before == report.bytes_after + (report.bytes_before - model_bytes(model))
    step(model, optimizer, batch())
    for part in mixtures(model):
        assert part.num_experts == (7 if family == "growing" else 6)


@pytest.mark.parametrize("family", ["mixtral", *LOCAL])
def test_a_step_after_pruning_unused_experts_is_the_step_that_would_have_been(family):
    given = batch(rows=1, tokens=2)
    model, optimizer = trained(family, given)
    use = measure_use(model, [given])
    frozen = 2 if family == "growing" else 0
    # those that go stand last
    order = {
        block: [*range(frozen), *sorted(range(frozen, 6), key=lambda e, part=part: (not part.tokens[e], e))]
        for block, part in use.items()
    }
    apply(model, keep(dict.fromkeys(order, 6), order), optimizer)
    number = min(int((part.tokens[frozen:] == 0).sum()) for part in use.values())
    assert number
    other, other_optimizer = twin(model, optimizer)
    moses.prune(model, experts=range(6 - number, 6), optimizer=optimizer)
    # the gate's products are of another shape now, and BLAS sums in another order: equal up to the last bits
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(step(model, optimizer, given), step(other, other_optimizer, given), **close)
    kept = {block: {e: e for e in range(6 - number - frozen)} for block in order}
    compared = list(kept_rows(model, other, kept))
    assert len(compared) == len(list(other.parameters()))
    for name, now, then in compared:
        torch.testing.assert_close(now, then, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["deepseek_v3", "biased"])
def test_a_step_after_masked_growth_is_the_step_that_would_have_been(family):
    model, optimizer = trained(family, batch())
    other, other_optimizer = twin(model, optimizer)
    moses.grow(model, add=2, source=1, new_rows="masked", optimizer=optimizer)
    assert torch.equal(step(model, optimizer, batch()), step(other, other_optimizer, batch()))
    kept = {part.block: {e: e for e in range(6)} for part in mixtures(model)}
    for name, now, then in kept_rows(model, other, kept):
        assert torch.equal(now, then), name


def test_an_optimizer_that_is_not_told_goes_on_with_tensors_that_are_gone():
    """The obvious mistake: the new tensors are in no parameter group, so nothing trains them."""
    model, optimizer = trained("mixtral", batch())
    moses.grow(model, add=2, source=1)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    step(model, optimizer, batch())
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)


def test_gradients_in_the_middle_of_an_accumulated_step_stay():
    model = make("mixtral")
    optimizer = optimizer_of(model)
    model(**batch()).loss.backward()
    old = model.model.layers[1].mlp.experts.down_proj.grad.clone()
    moses.prune(model, experts=[1], optimizer=optimizer)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj.grad, old[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pruned_model_saves_and_loads_in_plain_transformers(family, tmp_path):
    model = make(family).eval()
    moses.prune(model, to=4, by="norm", calibration=[batch()])
    assert model.config.get_text_config().num_experts_per_tok == 2
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert all(part.num_experts == 4 for part in mixtures(loaded))
    assert torch.isfinite(model.train()(**batch(), output_router_logits=True).loss)


@torch.no_grad()
def test_use_and_norm_are_what_loops_say():
    model = make("mixtral").eval()
    given = batch() | {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}
    seen = {}
    block = model.model.layers[1].mlp
    handle = block.register_forward_pre_hook(lambda _module, args: seen.update(x=args[0].detach().flatten(0, 1)))
    found = measure_use(model, [given], norms=True)["model.layers.1"]
    handle.remove()
    tokens, norms = [0] * 6, [0.0] * 6
    _, weights, ids = block.gate(seen["x"])
    real = given["attention_mask"].flatten().tolist()
    for token, counts in enumerate(real):
        for slot in range(2):
            if counts:
                e = int(ids[token, slot])
                gate, up = (block.experts.gate_up_proj[e] @ seen["x"][token]).chunk(2)
                y = block.experts.down_proj[e] @ (nn.functional.silu(gate) * up)
                tokens[e] += 1
                norms[e] += float(weights[token, slot] * y.norm())
    assert found.tokens.tolist() == tokens and sum(tokens) == 2 * sum(real)
    expected = [norm / max(count, 1) for norm, count in zip(norms, tokens, strict=True)]
    torch.testing.assert_close(found.norm, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_use_of_our_own_layers_is_counted_alike():
    for kind in ("biased", "growing"):
        model = make(kind)
        found = measure_use(model, [batch()], norms=True)
        assert set(found) == {"blocks.0", "blocks.1"}
        assert all(
            int(use.tokens.sum()) == 2 * 18 and bool((use.norm[use.tokens > 0] > 0).all()) for use in found.values()
        )


def test_growth_copies_the_most_used():
    model = make("mixtral")
    use = measure_use(model, [batch()])
    plan = moses.grow(model, add=2, calibration=[batch()])
    for part in plan.layers:
        best = sorted(range(6), key=lambda e: (-int(use[part.layer].tokens[e]), e))[:2]
        assert [slot.sources for slot in part.slots[6:]] == [(e,) for e in best]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fresh_experts_are_normal_by_their_fan_in(family):
    model = make(family)
    moses.grow(model, add=40, source="fresh")
    experts = model.model.layers[0].mlp.experts
    for weight, fan_in in ((experts.gate_up_proj[6:], 32), (experts.down_proj[6:], 48)):
        assert abs(float(weight.detach().std()) * fan_in**0.5 - 1) < 0.02
    if family == "gpt_oss":
        assert not bool(experts.down_proj_bias[6:].any())


def test_merging_joins_the_two_that_are_alike():
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[4] = experts.gate_up_proj[1] * 1.01
        experts.down_proj[4] = experts.down_proj[1]
    report = moses.prune(model, to=5, by="merge")
    slots = report.plan["model.layers.0"].slots
    assert [slot.sources for slot in slots] == [(0,), (1, 4), (2,), (3,), (5,)] and slots[1].weights == (0.5, 0.5)


def test_keep_usage_keeps_the_share_and_one_number_for_all_layers():
    model = make("qwen2_moe")
    use = measure_use(model, [batch()])
    report = moses.prune(model, keep_usage=0.6, calibration=[batch()])
    sizes = {len(part.slots) for part in report.plan.layers}
    assert len(sizes) == 1 and 2 <= sizes.pop() < 6
    for part in report.plan.layers:
        tokens = use[part.layer].tokens
        kept = sum(int(tokens[slot.sources[0]]) for slot in part.slots)
        assert kept >= 0.6 * int(tokens.sum())


def test_a_budget_is_kept_and_a_dry_run_changes_nothing():
    model, optimizer = trained("mixtral", batch())
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    size = model_bytes(model)
    budget = size - 2 * (3 * 32 * 48 + 32) * 4 * 3
    held_out = {"a": [batch(seed=2)], "b": [batch(seed=3)]}
    given = {"budget": budget, "calibration": [batch()], "held_out": held_out, "optimizer": optimizer}
    report = moses.prune(model, **given, dry_run=True)
    assert not report.applied and report.bytes_before == size and report.bytes_after <= budget
    assert set(report.perplexity_before) == set(report.perplexity_after) == {"a", "b"}
    assert report.perplexity_before != report.perplexity_after
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][key]) for key, value in values.items())
    assert model.config.num_local_experts == 6 and model.num_experts == 6
    again = moses.prune(model, **given)
    assert again.perplexity_after == report.perplexity_after and model_bytes(model) == report.bytes_after
    assert model.config.num_local_experts == model.num_experts == 3


WRONG = [
    ({"to": 0, "calibration": [batch()]}, "no_expert_left"),
    ({"experts": list(range(6))}, "no_expert_left"),
    ({"to": 1, "calibration": [batch()]}, "top_k_too_large"),
    ({"experts": [0, 1, 2], "top_k": 4}, "top_k_too_large"),
    ({"experts": [6]}, "unknown_expert"),
    ({"experts": {"model.layers.0": [1]}}, "uneven_layers"),
    ({"experts": {"model.layers.7": [1]}}, "unknown_layer"),
    ({"to": 4, "layers": [5], "calibration": [batch()]}, "unknown_layer"),
    ({"budget": 1000, "calibration": [batch()]}, "budget_too_small"),
    ({"to": 3}, "calibration_needed"),
    ({"keep_usage": 0.5, "by": "merge"}, "calibration_needed"),
    ({"keep_usage": 1.5, "calibration": [batch()]}, "bad_plan"),
    ({"to": 3, "experts": [1]}, "bad_plan"),
]


@pytest.mark.parametrize(("settings", "code"), WRONG, ids=[f"{code}-{n}" for n, (_, code) in enumerate(WRONG)])
def test_a_wrong_pruning_is_refused_before_anything_changes(settings, code):
    model = make("mixtral")
    optimizer = optimizer_of(model)
    parameters = list(model.parameters())
    with pytest.raises(SurgeryError) as caught:
        moses.prune(model, **settings, optimizer=optimizer)
    assert caught.value.code == code and "\n" not in str(caught.value)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


def test_a_wrong_growth_is_refused_before_anything_changes():
    model = make("mixtral")
    parameters = list(model.parameters())
    for settings, code in (
        ({}, "calibration_needed"),
        ({"source": "best"}, "bad_plan"),
        ({"source": 6}, "unknown_expert"),
        ({"source": 1, "add": 0}, "bad_plan"),
        ({"source": 1, "layers": ["model.layers.1"]}, "uneven_layers"),
        ({"source": 1, "new_rows": "masked"}, "cannot_mask"),
    ):
        with pytest.raises(SurgeryError) as caught:
            moses.grow(model, **settings)
        assert caught.value.code == code
    with pytest.raises(SurgeryError) as caught:
        moses.grow(nn.Linear(2, 2), source=1)
    assert caught.value.code == "no_mixture"
    with pytest.raises(SurgeryError) as caught:
        apply(model, keep({"model.layers.0": 5, "model.layers.1": 5}, {"model.layers.0": [0, 1, 2]}))
    assert caught.value.code == "plans_differ"
    dense = SurgeryPlan((LayerSurgery("model.layers.0", 6, (Slot((0,)),), dense=True),), top_k=1)
    with pytest.raises(SurgeryError):
        apply(model, dense)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


def test_frozen_experts_of_a_growing_layer_stay_frozen_and_tables_follow():
    layer = GrowingLayer(torch.randn(3, 8, 4), torch.randn(3, 4, 4), None, vocab_size=6)
    layer.add_table(torch.tensor([1, 2, 1, 2, 1, 2]))
    model = nn.Sequential(layer)
    with pytest.raises(SurgeryError) as caught:
        moses.prune(model, experts=[2])
    assert caught.value.code == "expert_in_use"
    plan = SurgeryPlan((LayerSurgery("0", 3, (Slot((1,)), Slot((2,)))),))
    kept = layer.into[[1, 2]]
    apply(model, plan)
    assert torch.equal(layer.into, kept) and layer.num_free == 0 and layer.tables.tolist() == [[0, 1, 0, 1, 0, 1]]
