"""A small decoder with random weights, from a JSON file of a few fields, and a byte-level BPE tokenizer trained for it.

The file is either a config of transformers (with `model_type`, for example mixtral, qwen2_moe, qwen3_moe, olmoe, or a dense one) or has the
fields of `SmallMoEConfig`: a Llama whose FFNs are mixtures with any router of `moses.routers`. The result is a folder that
`load_model` reads, so that all else works as from a pretrained model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import check_choice, check_int, from_settings
from .errors import ConfigError, ModelError
from .growth.folder import require_free, save_model
from .growth.layer import MixtureFFN
from .growth.layout import ROUTERS
from .models import kind_of, padded, quiet
from .routers import RandomRouter
from .seeds import stable_seed
from .stream import Stream, load_stream
from .stream.rows import read_json

SPECIAL = ("<pad>", "<s>", "</s>")
FIXED_TOP_K = {"switch": 1, "gshard": 2, "random": 1}
MAX_WIDTH, MAX_LAYERS, MAX_EXPERTS, MAX_VOCABULARY = 1 << 16, 1 << 10, 1 << 12, 1 << 22
"""What a file may ask for at most: more is a mistake, and would end in an allocation that fails."""


@dataclass(frozen=True, kw_only=True)
class SmallMoEConfig:
    """A small decoder with mixtures.

    Attributes:
        hidden_size: D.
        layers: blocks.
        heads: of attention; they divide `hidden_size` into even widths.
        ffn_size: F of an expert, and of the FFN in a block without experts.
        experts: E of a mixture; 0 makes a dense model.
        top_k: experts a token, where the router leaves a choice (switch and random have 1, gshard 2, dense E).
        router: `topk`, `noisy_topk`, `gshard`, `switch`, `dense`, `expert_choice` or `random`.
        every: a mixture in every so many blocks, the last of them first.
        vocab_size: of a tokenizer that is trained for the model, at most.
        max_positions: tokens of the longest input.
    """

    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    ffn_size: int = 384
    experts: int = 4
    top_k: int = 2
    router: str = "topk"
    every: int = 1
    vocab_size: int = 4096
    max_positions: int = 1024

    def __post_init__(self) -> None:
        limits = {
            "hidden_size": (1, MAX_WIDTH),
            "layers": (1, MAX_LAYERS),
            "heads": (1, MAX_WIDTH),
            "ffn_size": (1, MAX_WIDTH),
            "experts": (0, MAX_EXPERTS),
            "top_k": (1, MAX_EXPERTS),
            "every": (1, MAX_LAYERS),
            "vocab_size": (256 + len(SPECIAL), MAX_VOCABULARY),
            "max_positions": (8, MAX_VOCABULARY),
        }
        for field, (least, most) in limits.items():
            check_int(self, field, least)
            if getattr(self, field) > most:
                self._refuse(field, f"at most {most}")
        check_choice(self, "router", tuple(ROUTERS))
        if self.hidden_size % (2 * self.heads):
            self._refuse("heads", f"such that hidden_size ({self.hidden_size}) is a multiple of twice of it")
        if self.experts and self.top_k > self.experts:
            self._refuse("top_k", f"at most experts ({self.experts})")
        if self.experts and FIXED_TOP_K.get(self.router, 1) > self.experts:
            self._refuse("experts", f"at least {FIXED_TOP_K[self.router]} for the router {self.router}")

    def _refuse(self, field: str, allowed: str) -> None:
        raise ConfigError(
            f"{type(self).__name__}.{field} is {getattr(self, field)!r}; it must be {allowed}", code="bad_setting"
        )


def write_from_scratch(
    config: str | Path, stream: Stream | str, folder: str | Path, *, tokenizer: str | None = None, seed: int = 0
) -> Path:
    """Write a model of random weights and its tokenizer into the new `folder`.

    Args:
        config: the JSON file.
        stream: the tokenizer is trained on the texts of its first task.
        tokenizer: a folder or name to take a tokenizer from instead.
        seed: of the weights.

    Raises:
        ConfigError: the file is no config that can be built; the message names the field.
        ModelError: the tokenizer cannot be read, or the model is no decoder.
        StoreError: the folder is there already.
    """
    free = require_free(folder)
    fields = read_model_config(config)
    if tokenizer is None:
        loaded = load_stream(stream) if isinstance(stream, str) else stream
        task = loaded.tasks[0]
        words = make_tokenizer((f"{row.prompt} {row.answer}".strip() for row in task.train), _vocabulary(fields))
    else:
        words = _read_tokenizer(tokenizer)
    return save_model(make_model(fields, words, seed), free, words)


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The fields of the file. Raises ConfigError, StreamError or OSError where it is no JSON object."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; give a JSON file that describes a model", code="no_config")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: is not a JSON object; give one with model_type or hidden_size", code="bad_config")
    return fields


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens: every text is tokens, whatever its language, and back to the same bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos)


def make_model(fields: Mapping[str, Any], tokenizer: Any, seed: int = 0) -> Any:
    """The decoder of these fields for this tokenizer, in evaluation mode; the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    own = "model_type" not in fields
    small = from_settings(SmallMoEConfig, dict(fields)) if own else None
    config = _hf_config(small, fields, tokenizer)
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(stable_seed(seed, "from scratch") % 2**63)
        try:
            model = build(config, dtype=torch.float32)
        except (
            Exception
        ) as error:  # outside data: transformers raises almost any class for a config that it cannot build
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"cannot build a {config.model_type}: {reason}; mend the file", code="bad_model_config"
            ) from None
        if small is not None and small.experts:
            _put_mixtures(model, small, len(tokenizer), seed)
    return model.eval()


def _hf_config(small: SmallMoEConfig | None, fields: Mapping[str, Any], tokenizer: Any) -> Any:
    from transformers import CONFIG_MAPPING

    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if small is not None:
        llama: Any = CONFIG_MAPPING["llama"]
        return llama(
            hidden_size=small.hidden_size,
            intermediate_size=small.ffn_size,
            num_hidden_layers=small.layers,
            num_attention_heads=small.heads,
            num_key_value_heads=small.heads,
            max_position_embeddings=small.max_positions,
            tie_word_embeddings=True,
            **ids,
        )
    name = fields["model_type"]
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ConfigError(f"model_type is {name!r}; transformers has no such config", code="bad_model_config")
    try:
        config = CONFIG_MAPPING[name](**{key: value for key, value in fields.items() if key != "model_type"} | ids)
        kind = kind_of(config)
    except ModelError:
        raise
    except Exception as error:  # outside data, as above
        raise ConfigError(
            f"a {name} config cannot be made of the file: {' '.join(str(error).split())[:200]}; mend the field",
            code="bad_model_config",
        ) from None
    if kind != "causal":
        raise ModelError(
            f"model_type {name!r} is a {kind}; give a decoder, which is trained on texts", code="not_causal"
        )
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True  # its loss holds the balance loss then
    return config


def _put_mixtures(model: Any, small: SmallMoEConfig, vocab_size: int, seed: int) -> None:
    for number, block in enumerate(model.model.layers):
        if (small.layers - 1 - number) % small.every:
            continue
        path = f"model.layers.{number}.mlp"
        router = _router(small, path, vocab_size, seed)
        block.mlp = MixtureFFN(small.hidden_size, small.ffn_size, router, block=path)


def _router(small: SmallMoEConfig, path: str, vocab_size: int, seed: int) -> nn.Module:
    kind: Any = ROUTERS[small.router]
    if kind is RandomRouter:
        return RandomRouter(vocab_size, 1, small.experts, seed=seed, layer=path)
    fixed = small.router in FIXED_TOP_K or small.router == "dense"
    router: nn.Module = kind(small.hidden_size, small.experts, *(() if fixed else (small.top_k,)))
    return router


def _vocabulary(fields: Mapping[str, Any]) -> int:
    size = fields.get("vocab_size", SmallMoEConfig.vocab_size)
    if isinstance(size, bool) or not isinstance(size, int) or not 256 + len(SPECIAL) <= size <= MAX_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {size!r}; it must be a whole number from {256 + len(SPECIAL)} to {MAX_VOCABULARY}",
            code="bad_setting",
        )
    return size


def _read_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return padded(name, AutoTokenizer.from_pretrained(name))
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot load the tokenizer {name!r}: {reason}; give a folder that save_pretrained wrote",
            code="model_unreadable",
        ) from None
