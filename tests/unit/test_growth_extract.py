"""Extracted sub-models compute what the full model does when its gates may name only the experts that are kept."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file

import moses
from moses.errors import SurgeryError
from moses.growth import MixtureFFN, dense_ffns, load_folder, moe_blocks, route, save_model
from moses.growth.extract import apply_extraction, extract, extract_plan
from moses.growth.layout import describe
from moses.growth.upcycle import upcycle
from moses.routers import RandomRouter
from moses.surgery import operations as on_disk
from moses.surgery.plan import LayerSurgery, Slot, SurgeryPlan

# Qwen2-MoE's shared expert of width 0
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
IDS = torch.arange(3, 19)[None]
SOFTMAX = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo")


@pytest.fixture
def made(tiny_mixture):
    """Makes a mixture whose FFNs matter."""
    return lambda family, **changes: tiny_mixture(family, seed=2, **{"initializer_range": 0.3, **changes})


def logits(model, **routing) -> torch.Tensor:
    with torch.no_grad(), route(**routing):
        return model(input_ids=IDS).logits


@contextmanager
def only(model, kept: dict[int, list[int]]):
    """The gates of blocks may name the experts `kept` alone: the others' logits are -inf. A single one has the weight 1 and no runner-up."""

    def forward(gate, block):
        def restricted(x):
            x = x.reshape(-1, x.shape[-1])
            scores = F.linear(x, gate.weight)
            out = torch.ones(block.num_experts, dtype=torch.bool)
            out[kept[block.index]] = False
            scores = scores.masked_fill(out, float("-inf"))
            weights, ids = torch.topk(scores.softmax(-1), min(gate.top_k, len(kept[block.index])))
            if block.normalised:
                weights = weights / weights.sum(-1, keepdim=True)
            return scores, weights, ids

        return restricted

    with ExitStack() as patches:
        for block in moe_blocks(model):
            if block.index in kept:
                patches.enter_context(patch.object(block.module.gate, "forward", forward(block.module.gate, block)))
        yield


@pytest.mark.parametrize("family", SOFTMAX)
def test_a_smaller_mixture_is_the_full_one_restricted_bit_for_bit(made, family):
    model = made(family)
    kept = {0: [1, 4, 6], 1: [0, 2, 7]}
    small = extract(model, kept)
    with only(model, kept):
        assert torch.equal(logits(model), logits(small))
    assert type(small) is type(model) and describe(small) == []
    assert {block.num_experts for block in moe_blocks(small)} == {3}
    assert not torch.equal(logits(model), logits(small))


@pytest.mark.parametrize(
    ("family", "changes", "dense"),
    [
        ("mixtral", {}, "llama"),
        ("mixtral", {"sliding_window": 4}, "mistral"),
        ("qwen3_moe", {}, "qwen3"),
        ("flex_olmo", {}, "olmo2"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "qwen2"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0, "qkv_bias": False}, "llama"),
        ("olmoe", {}, "olmoe"),  # no class: moses's own, with plain FFNs
    ],
)
def test_one_expert_a_layer_is_a_dense_model(made, family, changes, dense):
    model = made(family, **changes)
    kept = {0: [5], 1: [2]}
    small = extract(model, kept)
    assert small.config.model_type == dense and len(dense_ffns(small)) == 2
    with only(model, kept):
        full = logits(model)
    assert (full - logits(small)).abs().max() < 1e-5 * full.abs().max()
    with only(model, kept):  # the same kernel for the expert: the dense model's own FFN
        swapped = {block.path: small.get_submodule(block.path) for block in moe_blocks(model)}
        for path, ffn in swapped.items():
            model.set_submodule(path, ffn)
        assert torch.equal(logits(model), logits(small))


def test_a_block_of_qwen_becomes_dense_among_mixtures(made):
    model = made("qwen3_moe")
    small = extract(model, {0: [3], 1: [1, 2]})
    assert small.config.mlp_only_layers == [] and small.config.decoder_sparse_step == 2 and describe(small) == []
    with only(model, {0: [3], 1: [1, 2]}):
        full = logits(model)
    assert (full - logits(small)).abs().max() < 1e-5 * full.abs().max()


@pytest.mark.parametrize("family", ("mixtral", "qwen3_moe", "gpt_oss"))
def test_uneven_layers_need_a_folder_of_moses(made, family, tmp_path):
    model = made(family)
    small = extract(model, {1: [6, 1, 3]})
    assert [place["kind"] for place in describe(small)] == ["resized"]
    if family != "gpt_oss":
        with only(model, {1: [1, 3, 6]}):
            assert (logits(model) - logits(small)).abs().max() < 1e-6
    folder = save_model(small, tmp_path / "small")
    assert torch.equal(logits(load_folder(folder)), logits(small))
    assert torch.equal(logits(moses.load(folder)), logits(small))


def test_biases_of_the_gate_are_cut_with_the_experts(made):
    model = made("gpt_oss")
    block = moe_blocks(model)[0]
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.router").bias.copy_(torch.arange(8.0))
    small = extract(model, {0: [7, 2, 3], 1: [0, 1, 2]})
    assert small.model.layers[0].mlp.router.bias.tolist() == [7.0, 2.0, 3.0]
    assert torch.equal(small.state_dict()[block.into_bias], model.state_dict()[block.into_bias][[7, 2, 3]])


def test_deepseek_keeps_its_shared_expert_and_its_bias(made):
    model = made("deepseek_v3")
    model.config.n_group = model.config.topk_group = 1
    gate = model.model.layers[1].mlp.gate
    gate.num_group = gate.topk_group = 1
    gate.e_score_correction_bias.copy_(torch.arange(8.0) / 8)
    small = extract(model, {1: [7, 5, 2]})
    assert small.config.n_routed_experts == 3
    assert small.model.layers[1].mlp.gate.e_score_correction_bias.tolist() == [7 / 8, 5 / 8, 2 / 8]
    one = extract(model, {1: [4]}, top_k=1)  # beside a shared expert it stays an expert
    assert moe_blocks(one)[0].num_experts == 1


def test_folders_load_in_plain_transformers_without_moses(made, tmp_path):
    small = {
        "mixtral": extract(made("mixtral"), {0: [1, 4, 6], 1: [0, 2, 7]}),
        "llama": extract(made("mixtral"), {0: [1], 1: [0]}),
        "qwen2": extract(made("qwen2_moe", shared_expert_intermediate_size=0), {0: [1], 1: [0]}),
        "qwen3": extract(made("qwen3_moe"), {0: [1], 1: [0]}),
        "qwen3-mixed": extract(made("qwen3_moe"), {0: [1], 1: [0, 5]}),
        "olmo2": extract(made("flex_olmo"), {0: [1], 1: [0]}),
        "qwen2_moe": extract(made("qwen2_moe"), {0: [1, 2], 1: [0, 3]}),
        "gpt_oss": extract(made("gpt_oss"), {0: [1, 2], 1: [0, 3]}),
        "upcycled": extract(small_upcycled(), {1: [0]}),
    }
    folders = [str(save_model(model, tmp_path / name)) for name, model in small.items()]
    script = (
        "import sys, torch, transformers as hf\n"
        "from safetensors.torch import save_file\n"
        "found = {}\n"
        "for folder in sys.argv[2:]:\n"
        "    model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), (folder, info)\n"
        "    with torch.no_grad():\n"
        "        found[folder] = model(input_ids=torch.arange(3, 19)[None]).logits\n"
        "assert not any(name.startswith('moses') for name in sys.modules)\n"
        "save_file(found, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "logits"), *folders], check=True, capture_output=True)
    found = load_file(tmp_path / "logits")
    for folder, (name, model) in zip(folders, small.items(), strict=True):
        assert torch.equal(found[folder], logits(model)), name


def small_upcycled():
    """A mixture of moses's own layer in one of two blocks, whose experts differ."""
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        dense = hf.LlamaForCausalLM(config).eval()
    return upcycle(dense, 4, router="dense", noise=0.3)


def test_moses_own_layer_becomes_the_ffn_of_its_class_again():
    model = small_upcycled()
    assert isinstance(model.model.layers[1].mlp, MixtureFFN)
    small = extract(model, {1: [0]})
    assert describe(small) == [] and type(small.model.layers[1].mlp).__name__ == "LlamaMLP"
    two = extract(model, {1: [3, 0]})
    assert [(place["kind"], place["router"]["settings"]["num_experts"]) for place in describe(two)] == [("mixture", 2)]
    mine, theirs = (part.model.layers[1].mlp.experts.into for part in (two, model))
    assert torch.equal(mine[0], theirs[3]) and torch.equal(mine[1], theirs[0])


def random_routed() -> hf.PreTrainedModel:
    """Two domains with a group of three experts each, which differ."""
    model = upcycle(small_upcycled(), 6, layers=[0], noise=0.3, router="dense")
    for block in moe_blocks(model):
        router = RandomRouter(97, 2, block.num_experts // 2, layer=block.block)
        block.module.router = router
    return model


def test_a_domain_of_random_routed_experts():
    model = random_routed()
    small = extract(model, {0: [3, 4, 5], 1: [2, 3]})
    full = logits(model, token_ids=IDS, domains=1)
    assert torch.equal(full, logits(small, token_ids=IDS, domains=0))
    assert small.model.layers[0].mlp.router.table.shape == (1, 97)
    with pytest.raises(SurgeryError) as error:
        extract(model, {0: [3, 4]})
    assert error.value.code == "groups_not_kept"
    merged = extract(model, {0: [3, 4, 5], 1: [2, 3]}, merge=True)
    assert describe(merged) == []
    mean = model.model.layers[0].mlp.experts.out[3:].mean(0)
    assert (merged.model.layers[0].mlp.down_proj.weight - mean).abs().max() < 1e-6


def test_merging_averages_and_says_where_it_cannot(made):
    model = made("mixtral")
    plan = extract_plan(model, {0: [1, 2], 1: [3]}, merge=True)
    assert plan["model.layers.0"] == LayerSurgery("model.layers.0", 8, (Slot((1, 2), (0.5, 0.5)),), dense=True)
    merged = apply_extraction(model, SurgeryPlan.from_json(plan.to_json()))
    assert merged.config.model_type == "llama"
    mean = model.model.layers[0].mlp.experts.down_proj[1:3].mean(0)
    assert (merged.model.layers[0].mlp.down_proj.weight - mean).abs().max() < 1e-6
    assert torch.equal(merged.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.experts.down_proj[3])
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v3"):
        with pytest.raises(SurgeryError) as error:
            extract_plan(made(family), {1: [1, 2]}, merge=True)
        assert error.value.code == "cannot_merge"


@pytest.mark.parametrize(
    ("family", "experts", "code"),
    [
        ("mixtral", {5: [0]}, "unknown_layer"),
        ("mixtral", {"model.layers.9": [0]}, "unknown_layer"),
        ("mixtral", {0: [8]}, "unknown_expert"),
        ("mixtral", {0: []}, "no_expert_left"),
        ("mixtral", {0: [1, 1]}, "bad_plan"),
        ("qwen2_moe", {0: [1]}, "top_k_too_large"),
        ("deepseek_v2", {0: [1, 2, 3]}, "groups_not_kept"),
    ],
)
def test_what_cannot_be_extracted(made, family, experts, code):
    with pytest.raises(SurgeryError) as error:
        extract(made(family), experts)
    assert error.value.code == code


def test_plans_of_other_models_and_of_growth_are_refused(made):
    model = made("mixtral")
    for slots, before, code in (
        ((Slot((0,)), Slot((0,), new=True)), 8, "needs_growth"),
        ((Slot((0,)),), 4, "plan_differs"),
    ):
        with pytest.raises(SurgeryError) as error:
            apply_extraction(model, SurgeryPlan((LayerSurgery("model.layers.0", before, slots),)))
        assert error.value.code == code


def test_top_k_is_of_the_whole_model(made, tmp_path):
    model = made("mixtral")
    small = extract(model, {1: [6, 1, 3]}, top_k=1)
    assert [block.top_k for block in moe_blocks(small)] == [1, 1] and small.config.num_experts_per_tok == 1
    assert [place["path"] for place in describe(small)] == ["model.layers.1.mlp"]
    with pytest.raises(SurgeryError) as error:
        extract(model, {0: [1], 1: [0, 1, 2]}, top_k=4)
    assert error.value.code == "top_k_too_large"
    beside = upcycle(small_upcycled(), 4, layers=[0], keep_dense=True)
    with pytest.raises(SurgeryError, match="has 4 experts and a token would use 5") as error:
        extract(beside, {}, top_k=5)
    assert error.value.code == "top_k_too_large"


@pytest.mark.parametrize("router", ["gshard", "switch", "expert_choice", "noisy_topk"])
def test_moses_routers_are_cut_and_load(router, tmp_path):
    dense = small_upcycled()
    model = upcycle(dense, 4, layers=[0], router=router, keep_dense=True, top_k=1 if router == "switch" else 2)
    if router in ("gshard", "switch"):
        with pytest.raises(SurgeryError) as error:
            extract(model, {0: [1, 2, 3]}, top_k=3)
        assert error.value.code == "fixed_top_k"
    kept = [2, 3] if router != "switch" else [2]
    small = extract(model, {0: kept, 1: [0]})
    assert torch.equal(logits(load_folder(save_model(small, tmp_path / router))), logits(small))
    assert [place["kind"] for place in describe(small)] == ["mixture"]
    assert torch.equal(small.model.layers[0].mlp.router.weight, model.model.layers[0].mlp.router.weight[kept])


def test_public_name():
    assert moses.extract is extract


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_a_plan_does_the_same_to_a_model_and_to_its_checkpoint(made, family, tmp_path):
    model = made(family)
    plan = extract_plan(model, {0: [6, 1, 3], 1: [0, 2, 7]})
    folder = save_model(model, tmp_path / "full")
    on_disk.apply(folder, plan, tmp_path / "small")
    loaded, mine = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), apply_extraction(model, plan)
    assert torch.equal(logits(loaded), logits(mine))
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_dense_plan_does_so_too(made, family, tmp_path):
    model = made(family)
    plan = extract_plan(model, {0: [6], 1: [0]})
    on_disk.apply(save_model(model, tmp_path / "full"), plan, tmp_path / "small")
    loaded, mine = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), apply_extraction(model, plan)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    assert torch.equal(logits(loaded), logits(mine))
