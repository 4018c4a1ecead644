"""Tiny random checkpoints of every model type, in every layout, single and sharded; each is made once a session."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
NUM_EXPERTS, TOP_K = 4, 2
LAYOUTS = [
    (kind, layout)
    for kind in TYPES
    for layout in ("per-expert", "fused")
    if (kind, layout) != ("gpt_oss", "per-expert")
]
COUNT_KEY = {
    "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}


def make_config(kind: str, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K, **changes: Any) -> Any:
    import transformers as hf

    shape = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": top_k,
        "intermediate_size": 12,
    }
    experts = {COUNT_KEY.get(kind, "num_experts"): num_experts}
    narrow = {"intermediate_size": 20, "moe_intermediate_size": 12}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    deep = narrow | latent | {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    makers: dict[str, Callable[..., Any]] = {
        "mixtral": hf.MixtralConfig,
        "qwen2_moe": hf.Qwen2MoeConfig,
        "qwen3_moe": hf.Qwen3MoeConfig,
        "olmoe": hf.OlmoeConfig,
        "flex_olmo": hf.FlexOlmoConfig,
        "deepseek_v2": hf.DeepseekV2Config,
        "deepseek_v3": hf.DeepseekV3Config,
        "gpt_oss": hf.GptOssConfig,
    }
    extra: dict[str, dict[str, Any]] = {
        "qwen2_moe": narrow | {"shared_expert_intermediate_size": 20},
        "qwen3_moe": {"intermediate_size": 12, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True},
        "deepseek_v2": deep | {"topk_method": "group_limited_greedy"},
        "deepseek_v3": deep,
        "gpt_oss": {
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return makers[kind](**(shape | experts | extra.get(kind, {}) | changes))


def make_model(kind: str, seed: int = 0, config: Any = None) -> Any:
    """A random model whose gates and biases tell experts apart."""
    import torch
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config or make_config(kind)).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if ".gate." in name or ".router." in name or name.endswith("_bias"):
                    tensor.normal_(std=0.5)
                elif ".experts" in name:
                    tensor.normal_(std=0.2)
    return model


def save(model: Any, folder: Path, layout: str = "per-expert", shards: int = 1) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        model.save_pretrained(
            folder,
            save_original_format=layout == "per-expert",
            max_shard_size=max(size // shards, 6000) if shards > 1 else "1GB",
        )
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def load(folder: Path) -> Any:
    """By plain transformers; a tensor that is missing, unexpected or of another shape is an error."""
    import transformers as hf

    model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {name: found for name, found in info.items() if found}
    assert not wrong, wrong
    return model.eval()


def logits(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 60).remainder(58).add(3).reshape(3, 19)
    with torch.inference_mode():
        return model(input_ids=ids).logits


def rebuilt(models: Sequence[Any], slots: Sequence[int], kind: str, top_k: int = TOP_K, **changes: Any) -> Any:
    """What surgery must give, by plain PyTorch: experts and gate rows of the joined models picked by number."""
    import torch

    states = [model.state_dict() for model in models]
    counts = [getattr(model.config, COUNT_KEY.get(kind, "num_experts")) for model in models]
    state = {}
    for name, tensor in states[0].items():
        moves = ".experts." in name or ".mlp.gate." in name or ".mlp.router." in name
        if moves and tensor.shape[0] == counts[0]:
            state[name] = torch.cat([other[name] for other in states])[list(slots)]
        else:
            state[name] = tensor
    config = copy.deepcopy(models[0].config)
    for key, value in {COUNT_KEY.get(kind, "num_experts"): len(slots), "num_experts_per_tok": top_k, **changes}.items():
        setattr(config, key, value)
    model = type(models[0])(config).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def models() -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(kind: str, seed: int = 0) -> Any:
        if (kind, seed) not in made:
            made[kind, seed] = make_model(kind, seed)
        return made[kind, seed]

    return get


@pytest.fixture(scope="session")
def checkpoints(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints("mixtral", "fused", shards=3, seed=1)`: a folder that tests must not change."""
    made: dict[Any, Path] = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def get(kind: str, layout: str = "per-expert", shards: int = 1, seed: int = 0) -> Path:
        key = (kind, layout, shards, seed)
        if key not in made:
            made[key] = save(models(kind, seed), root / "-".join(map(str, key)), layout, shards)
        return made[key]

    return get


@pytest.fixture
def copied(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """The same, as a copy that a test may change."""

    def get(*key: Any, **more: Any) -> Path:
        source = checkpoints(*key, **more)
        return Path(shutil.copytree(source, tmp_path / "source"))

    return get


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
