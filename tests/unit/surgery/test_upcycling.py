"""A dense checkpoint that becomes a mixture on disk loads with plain transformers and computes the same."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers as hf

from moses import surgery
from moses.errors import SurgeryError
from moses.surgery.upcycling import DEFAULTS, PAIRS

from .conftest import load, logits, read_config, save

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {
    "llama": lambda **more: hf.LlamaConfig(**SHAPE, **more),
    "mistral": lambda **more: hf.MistralConfig(**SHAPE, **more),
    "qwen2": lambda **more: hf.Qwen2Config(**SHAPE, **more),
    "qwen3": lambda **more: hf.Qwen3Config(**SHAPE, head_dim=8, **more),
    "olmo2": lambda **more: hf.Olmo2Config(**SHAPE, **more),
}


def dense(kind, folder, shards=1, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(DENSE[kind](**more)).eval()
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(tensor, std=0.2)
    return model, save(model, folder, "per-expert", shards)


CASES = [
    ("llama", 1, "mixtral", {}),
    ("llama", 2, "qwen2_moe", {"tie_word_embeddings": True}),
    ("mistral", 1, "mixtral", {"sliding_window": 8}),
    ("mistral", 2, "qwen2_moe", {"sliding_window": None}),
    ("qwen2", 2, "qwen2_moe", {}),
    ("qwen3", 2, "qwen3_moe", {}),
    ("olmo2", 1, "flex_olmo", {}),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of no width
@pytest.mark.parametrize(("kind", "every", "becomes", "more"), CASES)
def test_the_mixture_computes_what_the_dense_model_does(kind, every, becomes, more, tmp_path):
    model, source = dense(kind, tmp_path / "dense", shards=2, **more)
    done = surgery.upcycle(source, tmp_path / "out", num_experts=3, every=every)
    assert read_config(done.path)["model_type"] == becomes
    made = load(done.path)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-5)
    verdict = surgery.verify(done.path, source)
    assert verdict.ok, verdict.problems
    assert verdict.experts == 3 * 4 // every
    # and it is a checkpoint that surgery goes on with
    pruned = surgery.prune(done.path, tmp_path / "pruned", keep=[0, 2])
    torch.testing.assert_close(logits(load(pruned.path)), logits(model), rtol=1e-4, atol=1e-5)


def test_noise_tells_experts_apart_and_leaves_the_first(tmp_path):
    model, source = dense("qwen3", tmp_path / "dense")
    done = surgery.upcycle(source, tmp_path / "out", num_experts=3, layers=[1, 2], noise=0.1, seed=1)
    state, before = load(done.path).state_dict(), model.state_dict()
    fused = state["model.layers.2.mlp.experts.down_proj"]
    assert torch.equal(fused[0], before["model.layers.2.mlp.down_proj.weight"])
    assert 0.05 < (fused[1] - fused[0]).std() / fused[0].std() < 0.15
    assert not torch.equal(fused[1], fused[2])
    assert read_config(done.path)["mlp_only_layers"] == [0, 3]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.dense}-{pair.moe}")
def test_no_field_is_left_to_the_default_of_another_class(pair):
    """Whatever the two classes read differently where a config is silent is said; what only the dense class has is settled."""
    kinds = [hf.CONFIG_MAPPING[name] for name in (pair.dense, pair.moe)]
    old, new = ({part.name: part.default for part in dataclasses.fields(kind)} for kind in kinds)
    said = {*DEFAULTS[pair.dense], *pair.settings, pair.width, "num_key_value_heads", "model_type", "architectures"}
    assert {name for name in old if name in new and old[name] != new[name]} <= said
    assert {name for name in old if name not in new} <= {*pair.off, *pair.drop, "head_dim"}
    for name, value in DEFAULTS[pair.dense].items():
        if name in old:
            assert old[name] == value, name


@pytest.mark.parametrize(
    ("kind", "more", "asked", "why"),
    [
        ("llama", {"mlp_bias": True}, {"every": 1}, "mlp_bias"),
        ("mistral", {"sliding_window": 8}, {"every": 2}, "sliding_window"),
        ("olmo2", {}, {"every": 2}, "every block"),
        ("qwen3", {}, {"layers": [9]}, "blocks 0 to 3"),
        ("qwen3", {}, {"top_k": 9}, "top_k"),
    ],
)
def test_what_no_class_holds_is_refused_with_the_reason(kind, more, asked, why, tmp_path):
    _, source = dense(kind, tmp_path / "dense", **more)
    with pytest.raises(SurgeryError, match=why):
        surgery.upcycle(source, tmp_path / "out", **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_mixture_is_not_upcycled(checkpoints, tmp_path):
    with pytest.raises(SurgeryError) as caught:
        surgery.upcycle(checkpoints("mixtral"), tmp_path / "out")
    assert caught.value.code == "not_upcyclable"
    assert json.loads((checkpoints("mixtral") / "config.json").read_text())["model_type"] == "mixtral"
