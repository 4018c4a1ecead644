"""A dense checkpoint becomes a mixture of a class of transformers, on disk: which class holds it, and its config. Free of torch.

Every expert is a copy of the FFN and the weights of a token's experts sum to 1, so the result computes what the dense model does
(Komatsuzaki et al., arXiv 2212.05055). The classes read missing config fields differently, so nothing is left to a default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._core import SurgeryJob
from ..errors import SurgeryError
from .checkpoint import open_checkpoint
from .operations import PathLike, Surgery, Writing, require_place
from .plan import LayerSurgery, Slot, SurgeryPlan
from .selection import read_json

CONFIG = "config.json"
_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False, "attention_dropout": 0.0}
_BIG = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _COMMON
    | _BIG
    | _TOKENS
    | {"intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None},
    "mistral": _COMMON
    | _BIG
    | _TOKENS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": _COMMON
    | _BIG
    | _NO_TOKENS
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "qwen3": _COMMON
    | _BIG
    | _NO_TOKENS
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "olmo2": _COMMON
    | _BIG
    | {
        "vocab_size": 50304,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "attention_bias": False,
    },
}
"""What each dense class reads where its config is silent (transformers 5)."""


@dataclass(frozen=True)
class Pair:
    """A dense type and a type of mixtures that computes the same where every expert is the FFN.

    Attributes:
        dense, moe: model types.
        architecture: the beginnings of the class names.
        whole: whether every block of the MoE class is a mixture.
        settings: fields of the MoE config that make it so.
        off: fields of the dense config that the other class lacks and that must say nothing.
        drop: fields of the dense config that the other class does not need.
        number, width: fields with the number of experts and their width.
        empty: tensors of the class, by block, that stand for nothing; -1 in a shape is the model's width.
    """

    dense: str
    moe: str
    architecture: tuple[str, str]
    whole: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    off: Sequence[str] = ()
    drop: Sequence[str] = ()
    number: str = "num_experts"
    width: str = "moe_intermediate_size"
    empty: Sequence[tuple[str, Sequence[int]]] = ()


_LLAMA_OFF = ("attention_bias", "mlp_bias")
_LLAMA_DROP = (*_LLAMA_OFF, "pretraining_tp")
_QWEN2 = {"norm_topk_prob": True, "shared_expert_intermediate_size": 0}
_PLAIN_QWEN2 = {**_QWEN2, "qkv_bias": False, "use_sliding_window": False, "sliding_window": None}
_SHARED = (
    ("mlp.shared_expert.gate_proj.weight", (0, -1)),
    ("mlp.shared_expert.up_proj.weight", (0, -1)),
    ("mlp.shared_expert.down_proj.weight", (-1, 0)),
    ("mlp.shared_expert_gate.weight", (1, -1)),
)
_MIXTRAL = {"number": "num_local_experts", "width": "intermediate_size"}
PAIRS = (
    Pair(
        "llama",
        "mixtral",
        ("Llama", "Mixtral"),
        True,
        {"sliding_window": None},
        _LLAMA_OFF,
        _LLAMA_DROP,
        "num_local_experts",
        "intermediate_size",
    ),
    Pair("mistral", "mixtral", ("Mistral", "Mixtral"), True, **_MIXTRAL),  # type: ignore[arg-type]
    Pair("llama", "qwen2_moe", ("Llama", "Qwen2Moe"), False, _PLAIN_QWEN2, _LLAMA_OFF, _LLAMA_DROP, empty=_SHARED),
    Pair("mistral", "qwen2_moe", ("Mistral", "Qwen2Moe"), False, _PLAIN_QWEN2, ("sliding_window",), empty=_SHARED),
    Pair("qwen2", "qwen2_moe", ("Qwen2", "Qwen2Moe"), False, {**_QWEN2, "qkv_bias": True}, empty=_SHARED),
    Pair(
        "qwen3",
        "qwen3_moe",
        ("Qwen3", "Qwen3Moe"),
        False,
        {"norm_topk_prob": True},
        ("use_sliding_window",),
        ("layer_types", "max_window_layers"),
    ),
    Pair("olmo2", "flex_olmo", ("Olmo2", "FlexOlmo"), True, {"norm_topk_prob": True}, width="intermediate_size"),
)


def upcycle(
    checkpoint: PathLike,
    out: PathLike | None = None,
    *,
    num_experts: int = 8,
    every: int | None = None,
    layers: Sequence[int] | None = None,
    top_k: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    writing: Writing | None = None,
) -> Surgery:
    """Make a mixture of a dense llama, mistral, qwen2, qwen3 or olmo2 checkpoint: experts 1 and up are copies, with noise if asked for.

    Args:
        checkpoint: the dense checkpoint's folder.
        out: the folder to write.
        num_experts: of each mixture.
        every: mixtures in every n-th block, the n-th first; 2 where neither this nor `layers` is given, 1 for all.
        layers: numbers of the blocks that become mixtures, from 0.
        top_k: experts a token.
        noise: relative to the deviation of each matrix.
        seed: of the noise and the gates.
        writing: how the output is written.

    Raises:
        FormatError: the checkpoint contradicts itself.
        SurgeryError: `not_upcyclable` where no class of transformers holds the result, with the reasons; else as `apply`.
    """
    writing = writing or Writing()
    require_place(out, writing)
    if writing.in_place:
        raise SurgeryError(
            "upcycle: a dense checkpoint cannot change in place; give an output folder", code="bad_choice"
        )
    for name, value, least in (
        ("num_experts", num_experts, 1),
        ("top_k", top_k, 1),
        ("every", every or 1, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SurgeryError(f"upcycle: {name} is {value!r}; it must be a number from {least}", code="bad_choice")
    if not 0 <= noise < math.inf:
        raise SurgeryError(f"upcycle: noise is {noise!r}; it must be a number from 0", code="bad_choice")
    if top_k > num_experts:
        raise SurgeryError(
            f"upcycle: top_k is {top_k} and there are {num_experts} experts; use at most all", code="bad_choice"
        )
    if every is not None and layers is not None:
        raise SurgeryError("upcycle: give every or layers, not both", code="bad_choice")
    opened = open_checkpoint(checkpoint)
    config = read_json(Path(checkpoint) / CONFIG)
    assert isinstance(config, dict)  # the core read it as an object
    pair, made, chosen = upcycled_config(str(checkpoint), config, every, layers, num_experts, top_k)
    text = json.dumps(made, indent=2) + "\n"
    empty = [(name, list(shape)) for name, shape in pair.empty]
    job = SurgeryJob.upcycle(opened.native, pair.moe, text, chosen, num_experts, noise, seed, empty)
    slots = (Slot((0,)), *[Slot((0,), new=True, noise=noise)] * (num_experts - 1))
    plan = SurgeryPlan(tuple(LayerSurgery(f"model.layers.{n}", 1, slots) for n in chosen), top_k, seed=seed)
    description = json.loads(job.describe(writing.link))
    if noise == 0:
        description["notes"].append(f"a {pair.moe} whose experts are copies computes what the {pair.dense} does")
    if writing.dry_run:
        return Surgery("upcycle", plan, None, description)
    path, _ = job.run(out or "", writing.link, writing.hash, writing.progress)
    return Surgery("upcycle", plan, Path(path), description)


def upcycled_config(
    path: str,
    config: Mapping[str, Any],
    every: int | None,
    layers: Sequence[int] | None,
    num_experts: int,
    top_k: int,
) -> tuple[Pair, dict[str, Any], list[int]]:
    """The class, its config, and the numbers of the blocks that become mixtures. Raises `SurgeryError` (`not_upcyclable`)."""
    kind = config.get("model_type")
    full = {**DEFAULTS.get(str(kind), {}), **config}
    count = full.get("num_hidden_layers")
    if kind not in DEFAULTS or isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 1 << 16:
        known = ", ".join(DEFAULTS)
        raise SurgeryError(
            f"{path}: surgery upcycles {known}, not {kind!r} of {count!r} layers; upcycle the model in memory",
            code="not_upcyclable",
        )
    step = 2 if every is None else every
    chosen = [n for n in range(count) if (n + 1) % step == 0] if layers is None else sorted(set(layers))
    wrong = [n for n in chosen if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < count]
    if wrong:
        raise SurgeryError(
            f"{path}: layers names block {wrong[0]!r}; it has blocks 0 to {count - 1}", code="unknown_layer"
        )
    if not chosen:
        raise SurgeryError(
            f"{path}: every={step} of {count} blocks: no block would be a mixture; give at most {count}",
            code="unknown_layer",
        )
    reasons = []
    for pair in (pair for pair in PAIRS if pair.dense == kind):
        reason = _refusal(pair, full, chosen, count)
        if reason is None:
            return pair, _config(pair, config, full, chosen, count, num_experts, top_k), chosen
        reasons.append(reason)
    raise SurgeryError(f"{path}: {'; '.join(reasons)}; choose other blocks", code="not_upcyclable")


def _refusal(pair: Pair, full: Mapping[str, Any], chosen: Sequence[int], count: int) -> str | None:
    if pair.whole and len(chosen) < count:
        return f"in {pair.moe} every block is a mixture"
    on = [name for name in pair.off if full.get(name)]
    if on:
        return f"{pair.moe} has no {on[0]} = {full[on[0]]!r}"
    if "quantization_config" in full:
        return "it is quantised"
    kinds = full.get("layer_types")
    if "layer_types" in pair.drop and isinstance(kinds, list) and set(kinds) - {"full_attention"}:
        return f"{pair.moe} has no {sorted(set(map(str, kinds)) - {'full_attention'})[0]}"
    return None


def _config(
    pair: Pair,
    config: Mapping[str, Any],
    full: Mapping[str, Any],
    chosen: Sequence[int],
    count: int,
    num_experts: int,
    top_k: int,
) -> dict[str, Any]:
    made = {name: value for name, value in full.items() if name not in pair.drop}
    if made.get("num_key_value_heads") is None:
        made["num_key_value_heads"] = full["num_attention_heads"]
    if "rope_theta" not in config and "rope_parameters" not in config:
        made["rope_theta"] = 10000.0
    made |= dict(pair.settings)
    made |= {
        "model_type": pair.moe,
        pair.number: num_experts,
        "num_experts_per_tok": top_k,
        pair.width: full["intermediate_size"],
    }
    if pair.moe == "qwen3_moe":
        made["num_local_experts"] = num_experts  # one version of transformers reads this key, another the other
    if not pair.whole:
        made |= _sparse(chosen, count)
    names = config.get("architectures")
    if isinstance(names, list):
        old, new = pair.architecture
        made["architectures"] = [str(name).replace(old, new, 1) for name in names]
    return made


def _sparse(chosen: Sequence[int], count: int) -> dict[str, Any]:
    """`decoder_sparse_step` and `mlp_only_layers` that make the chosen blocks mixtures: by the step where one says it."""
    for step in range(1, count + 1):
        if list(chosen) == [n for n in range(count) if (n + 1) % step == 0]:
            return {"decoder_sparse_step": step, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in range(count) if n not in chosen]}
