"""Fixtures that many tests share: tiny random models of every family."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Numpy's BLAS threads wait for each other where other work runs on the machine, and small systems gain nothing from them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "phi", "bert", "t5")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are faster on one thread, far more so where other work runs on the machine."""
    import torch

    torch.set_num_threads(1)


def _config(family: str, vocab_size: int, positions: int) -> Any:
    import transformers as hf

    wide = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = wide | ids | {"num_key_value_heads": 2}
    makers = {
        "llama": lambda: hf.LlamaConfig(**decoder),
        "mistral": lambda: hf.MistralConfig(**decoder, head_dim=8),
        "qwen2": lambda: hf.Qwen2Config(**decoder),
        "qwen3": lambda: hf.Qwen3Config(**decoder, head_dim=8),
        "gemma": lambda: hf.GemmaConfig(**decoder, head_dim=8),
        "gemma2": lambda: hf.Gemma2Config(**decoder, head_dim=8),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=positions, **ids
        ),
        "phi": lambda: hf.PhiConfig(**decoder),
        "bert": lambda: hf.BertConfig(**wide, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "t5": lambda: hf.T5Config(
            vocab_size=vocab_size,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
            dropout_rate=0.0,
        ),
    }
    return makers[family]()


def make_tiny_model(family: str, seed: int = 0, vocab_size: int = 97, positions: int = 64) -> Any:
    """A random model of a family: 2 blocks, width 32; in evaluation mode."""
    import torch
    import transformers as hf

    kinds = {"bert": hf.AutoModelForSequenceClassification, "t5": hf.AutoModelForSeq2SeqLM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(family, vocab_size, positions)
        return kinds.get(family, hf.AutoModelForCausalLM).from_config(config).eval()


def make_tiny_mixture(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random mixture of a class of transformers: 2 blocks, width 32, 8 experts, top 2 (DeepSeek-V3's first block dense); config's `changes`."""
    import torch
    import transformers as hf

    wide = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
    }
    latent = {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    narrow = {"num_experts": 8, "moe_intermediate_size": 24}
    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "mixtral": (hf.MixtralConfig, {"num_local_experts": 8}),
        "qwen2_moe": (hf.Qwen2MoeConfig, narrow | {"shared_expert_intermediate_size": 16}),
        "qwen3_moe": (hf.Qwen3MoeConfig, narrow | {"head_dim": 8}),
        "olmoe": (hf.OlmoeConfig, {"num_experts": 8}),
        "flex_olmo": (hf.FlexOlmoConfig, {"num_experts": 8}),
        "deepseek_v2": (hf.DeepseekV2Config, latent),
        "deepseek_v3": (hf.DeepseekV3Config, latent | {"first_k_dense_replace": 1}),
        "gpt_oss": (hf.GptOssConfig, {"num_local_experts": 8, "head_dim": 8, "rope_parameters": rope}),
    }
    kind, own = makers[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf.AutoModelForCausalLM.from_config(kind(**{**wide, **own, **changes})).eval()


@pytest.fixture
def tiny_mixture() -> Callable[..., Any]:
    """Makes tiny random mixtures of transformers: `tiny_mixture("mixtral")`."""
    return make_tiny_mixture


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Makes tiny random models: `tiny_model("llama")`."""
    return make_tiny_model


@pytest.fixture
def tiny_batch() -> Callable[..., dict[str, Any]]:
    """Makes a training batch for a family: `tiny_batch("llama", rows=3, tokens=7)`."""

    def make(family: str, rows: int = 3, tokens: int = 7, seed: int = 1) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, 97, (rows, tokens), generator=generator)
        labels = torch.randint(0, 2, (rows,), generator=generator) if family == "bert" else input_ids.clone()
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tiny random Llama and a word tokenizer made from the built-in `tiny` stream, as `save_pretrained` writes it."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from moses.stream import load_stream

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    texts = [f"{row.prompt} {row.answer}" for task in load_stream("tiny").tasks for row in (*task.train, *task.test)]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<s>", "</s>", "<unk>"]))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
