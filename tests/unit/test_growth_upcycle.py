"""Upcycled models compute what the dense model did: every family, in memory and after a plain load in a process without moses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import moses
from moses.errors import ConfigError, SurgeryError
from moses.growth import classes, dense_ffns, load_folder, moe_blocks, route, save_model
from moses.growth.upcycle import expert_tensors, require_same, upcycle, upcycle_plan
from moses.routers import TopKRouter

# far from every default, so that what is not carried is seen; 0.3 makes the FFNs matter
WIDE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 3e-3,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
IDS = torch.arange(3, 19)[None]

# name: config, settings of upcycle, the class that holds it ("" for moses's layer)
CASES = {
    "llama-all": (lambda: hf.LlamaConfig(**WIDE, tie_word_embeddings=True), {"every": 1}, "mixtral"),
    "llama-wide-heads": (lambda: hf.LlamaConfig(**{**WIDE, **SCALED}, head_dim=16), {"every": 1}, "mixtral"),
    "llama-3": (
        lambda: hf.LlamaConfig(**{**WIDE, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
        {"every": 1},
        "mixtral",
    ),
    "llama-every-other": (lambda: hf.LlamaConfig(**WIDE, head_dim=16), {}, "qwen2_moe"),
    "llama-top": (lambda: hf.LlamaConfig(**WIDE, tie_word_embeddings=True), {"layers": [1, 2]}, "qwen2_moe"),
    "llama-biased": (lambda: hf.LlamaConfig(**WIDE, attention_bias=True), {"every": 1}, ""),
    "llama-biased-ffn": (lambda: hf.LlamaConfig(**WIDE, mlp_bias=True), {"every": 1}, ""),
    "mistral-all": (lambda: hf.MistralConfig(**WIDE, sliding_window=4), {"every": 1}, "mixtral"),
    "mistral-every-other": (lambda: hf.MistralConfig(**WIDE, sliding_window=None), {}, "qwen2_moe"),
    "mistral-window": (lambda: hf.MistralConfig(**WIDE, sliding_window=4), {}, ""),
    "qwen2": (lambda: hf.Qwen2Config(**WIDE, tie_word_embeddings=True), {"layers": [0]}, "qwen2_moe"),
    "qwen2-window": (lambda: hf.Qwen2Config(**WIDE, **WINDOWS), {"every": 1}, "qwen2_moe"),
    "qwen3": (lambda: hf.Qwen3Config(**WIDE, head_dim=16, attention_bias=True), {"every": 3}, "qwen3_moe"),
    "qwen3-window": (lambda: hf.Qwen3Config(**WIDE, **WINDOWS, head_dim=8), {"every": 1}, ""),
    "olmo2-all": (lambda: hf.Olmo2Config(**WIDE, attention_bias=True), {"every": 1}, "flex_olmo"),
    "olmo2-some": (lambda: hf.Olmo2Config(**WIDE), {}, ""),
    "gemma2": (lambda: hf.Gemma2Config(**WIDE, head_dim=8), {"every": 1}, ""),
    "phi3": (lambda: hf.Phi3Config(**WIDE), {"every": 1}, ""),
    "gpt2": (
        lambda: hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.3),
        {},
        "",
    ),
    "phi": (
        lambda: hf.PhiConfig(**{k: v for k, v in WIDE.items() if k != "rms_norm_eps"}, layer_norm_eps=3e-3),
        {},
        "",
    ),
    "gpt_neox": (lambda: hf.GPTNeoXConfig(**{k: v for k, v in WIDE.items() if k != "num_key_value_heads"}), {}, ""),
}


def made(name: str) -> hf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = hf.AutoModelForCausalLM.from_config(CASES[name][0]()).eval()
        for part, values in model.named_parameters():  # biases start at 0 and say nothing
            if part.endswith("bias"):
                torch.nn.init.normal_(values, std=0.3)
        return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def difference(model, other: torch.Tensor) -> float:
    before = logits(model)
    return float((before - other).abs().max() / before.abs().max())


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory) -> dict[str, tuple]:
    """Every case: the dense model, the upcycled one, and its folder."""
    root = tmp_path_factory.mktemp("upcycled")
    found = {}
    for name, (_, settings, _) in CASES.items():
        dense = made(name)
        moe = upcycle(dense, 4, **settings)
        found[name] = (dense, moe, save_model(moe, root / name))
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_dense_models(upcycled, name):
    dense, moe, _ = upcycled[name]
    assert moe.config.model_type == (CASES[name][2] or dense.config.model_type)
    assert difference(dense, logits(moe)) < 1e-5
    wanted = {"every": 2, **CASES[name][1]}
    layers = wanted.get("layers", [i for i in range(3) if (i + 1) % wanted["every"] == 0])
    blocks = moe_blocks(moe)
    assert [block.index for block in blocks] == layers
    assert {(block.num_experts, block.top_k, block.normalised) for block in blocks} == {(4, 2, True)}
    assert (moe.get_input_embeddings().weight is moe.get_output_embeddings().weight) == dense.config.tie_word_embeddings


def test_classes_load_in_plain_transformers_without_moses(upcycled, tmp_path):
    names = [name for name, (_, _, kind) in CASES.items() if kind]
    folders = [str(upcycled[name][2]) for name in names]
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
    for name, folder in zip(names, folders, strict=True):
        dense, moe, _ = upcycled[name]
        assert difference(dense, found[folder]) < 1e-5, name
        assert torch.equal(logits(moe), found[folder]), name


@pytest.mark.parametrize("name", [name for name, (_, _, kind) in CASES.items() if not kind])
def test_moses_own_folders_load_to_the_same_bits(upcycled, name):
    _, moe, folder = upcycled[name]
    assert torch.equal(logits(load_folder(folder)), logits(moe))
    with pytest.raises((OSError, ValueError)):  # never as the dense model with random FFNs
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_experts_are_the_ffn_and_may_be_noisy_or_new():
    dense = made("llama-all")
    ffn = dense_ffns(dense)[0]
    slots = upcycle_plan([ffn], 3, 2, noise=0.1, seed=5)
    noisy = expert_tensors(ffn, slots)
    assert torch.equal(noisy["into"][0], ffn.into) and torch.equal(noisy["out"][0], ffn.out)
    spread = (noisy["into"][1] - ffn.into).std() / ffn.into.std()
    assert 0.09 < spread < 0.11 and not torch.equal(noisy["into"][1], noisy["into"][2])
    again = expert_tensors(ffn, slots)
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    new = expert_tensors(ffn, upcycle_plan([ffn], 3, 2, seed=5), reinit=0.25)
    changed = (new["out"][1] != ffn.out).any(0)
    assert int(changed.sum()) == 12  # a quarter of 48 neurons, the same ones in all three maps
    rows = new["into"][1].view(2, 48, 32) != ffn.into.view(2, 48, 32)
    assert torch.equal(rows.any(2)[0], changed) and torch.equal(rows.any(2)[1], changed)


@pytest.mark.parametrize("router", ["topk", "noisy_topk", "gshard", "dense", "switch", "expert_choice"])
def test_keep_dense_is_exact_at_first_and_learns(router):
    dense = made("llama-all")
    moe = upcycle(dense, 4, every=1, keep_dense=True, router=router, top_k=1 if router == "switch" else 2)
    assert torch.equal(logits(dense), logits(moe))
    moe.train()
    with route() as outputs:
        loss = moe(input_ids=IDS, labels=IDS).loss
    assert set(outputs) == {f"model.layers.{i}" for i in range(3)}
    (loss + sum(output.loss for output in outputs.values())).backward()
    assert moe.model.layers[0].mlp.experts.out.grad.abs().sum() > 0


@pytest.mark.parametrize("router", ["noisy_topk", "gshard", "dense"])
def test_other_routers_preserve_too(router):
    dense = made("qwen3")
    assert difference(dense, logits(upcycle(dense, 4, router=router))) < 1e-5


def test_a_seed_gives_the_same_bits_and_the_model_stays(tiny_model):
    dense = tiny_model("llama")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    torch.manual_seed(1)
    one = upcycle(dense, 4, noise=0.1, seed=3).state_dict()
    torch.manual_seed(2)
    two, other = (upcycle(dense, 4, noise=0.1, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_half_precision_and_mode_are_kept():
    dense = made("qwen2").to(torch.bfloat16).train()
    moe = upcycle(dense, 4)
    assert moe.dtype == torch.bfloat16 and moe.training and dense.training
    assert upcycle(made("gemma2").to(torch.bfloat16), 4).dtype == torch.bfloat16


def test_public_name():
    assert moses.upcycle is upcycle


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"num_experts": 0}, "bad_setting", "num_experts is 0"),
        ({"num_experts": 2, "top_k": 3}, "bad_setting", "top_k is 3 and there are 2"),
        ({"every": 1, "layers": [1]}, "bad_setting", "every or layers"),
        ({"router": "nonsense"}, "bad_setting", "must be one of topk"),
        ({"router": "switch", "top_k": 1}, "bad_setting", "or keep_dense"),
        ({"router": "gshard", "top_k": 1}, "bad_setting", "has top_k 2"),
        ({"noise": -1.0}, "bad_setting", "noise is -1"),
        ({"noise": float("nan")}, "bad_setting", "noise is nan"),
        ({"reinit": 1.5}, "bad_setting", "share from 0 to 1"),
        ({"seed": -1}, "bad_setting", "seed is -1"),
        ({"every": 9}, "unknown_layer", "no block would be a mixture"),
        ({"layers": []}, "unknown_layer", "names block none"),
        ({"layers": [0, 7]}, "unknown_layer", "names block 7; the model has dense FFNs in blocks 0 to 1"),
    ],
)
def test_settings_that_cannot_work(tiny_model, settings, code, says):
    with pytest.raises(ConfigError, match=says) as error:
        upcycle(tiny_model("llama"), **settings)
    assert error.value.code == code


def test_a_config_that_is_not_carried_is_refused(tiny_model, monkeypatch):
    dense, carried = made("llama-all"), classes.carry
    moe = upcycle(dense, 2, every=1)
    moe.config.rms_norm_eps = 1e-6

    def forgets(config, model_type, extra, neutral):
        return carried(config, model_type, {**extra, "rms_norm_eps": 1e-6}, neutral)

    monkeypatch.setattr(classes, "carry", forgets)
    with pytest.raises(SurgeryError, match="of the largest logit") as error:
        upcycle(dense, 2, every=1)
    assert error.value.code == "not_preserved"
    assert require_same(dense, dense) == 0.0


def test_own_layer_routes_by_softmax_of_the_chosen(tiny_model):
    layer = upcycle(tiny_model("gpt2"), 4, every=1, top_k=1).transformer.h[0].mlp
    assert isinstance(layer.router, TopKRouter) and layer.router.scoring == "softmax_after"
    assert torch.equal(layer.router(torch.randn(3, 32)).routes.weights, torch.ones(3, 1))
