"""Which class of transformers holds a dense model with mixtures in the place of its FFNs, and back; configs are carried field by field.

The classes' defaults differ (`rms_norm_eps`, `rope_theta`, biases, token ids), so nothing is left to a default: every field that the class of the
source declares is given to the target, stands for nothing there (`neutral`), or is the reason why the target cannot hold the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SurgeryError

# say nothing about what is computed
_METADATA = {
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
}
_MIXTURE = {
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
} | {
    "router_jitter_noise",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
}
Neutral = Mapping[str, Callable[[Any], bool]]


def _any(_: Any) -> bool:
    return True


def _off(value: Any) -> bool:
    return not value


def _full(layer_types: Any) -> bool:
    return all(kind == "full_attention" for kind in layer_types or ())


@dataclass(frozen=True)
class Pair:
    """A dense class and a class of mixtures that computes the same where every expert is the FFN.

    Attributes:
        dense, moe: model types.
        whole: whether every block of the MoE class is a mixture.
        settings: fields of the MoE config that make it so.
        neutral: fields of the dense config that the other lacks, and whether a value changes nothing.
        back: the same of the MoE config, apart from the fields of every mixture.
        number, width: fields of the MoE config with the number of experts and their width.
    """

    dense: str
    moe: str
    whole: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    neutral: Neutral = field(default_factory=dict)
    back: Neutral = field(default_factory=dict)
    number: str = "num_experts"
    width: str = "moe_intermediate_size"


_LLAMA: Neutral = {"attention_bias": _off, "mlp_bias": _off, "pretraining_tp": _any}
_WINDOW: Neutral = {"sliding_window": _off}
_WINDOWS: Neutral = {**_WINDOW, "use_sliding_window": _off, "max_window_layers": _any, "layer_types": _full}
_QWEN2 = {"norm_topk_prob": True, "shared_expert_intermediate_size": 0}
PAIRS = (
    Pair("llama", "mixtral", True, {"sliding_window": None}, _LLAMA, _WINDOW, "num_local_experts", "intermediate_size"),
    Pair("mistral", "mixtral", True, {}, {}, {}, "num_local_experts", "intermediate_size"),
    Pair("llama", "qwen2_moe", False, {**_QWEN2, "qkv_bias": False}, _LLAMA, _WINDOWS),
    Pair("mistral", "qwen2_moe", False, {**_QWEN2, "qkv_bias": False}, _WINDOW, _WINDOWS),
    Pair("qwen2", "qwen2_moe", False, {**_QWEN2, "qkv_bias": True}),
    Pair("qwen3", "qwen3_moe", False, {"norm_topk_prob": True}, {"layer_types": _full, "max_window_layers": _any}),
    Pair("olmo2", "flex_olmo", True, {"norm_topk_prob": True}, width="intermediate_size"),
)


def moe_config(config: Any, layers: Sequence[int], num_experts: int, top_k: int) -> tuple[Any, str]:
    """The config of a class of mixtures that holds a dense model whose FFNs of `layers` became `num_experts` experts.

    Args:
        config: of the dense model.
        layers: numbers of the blocks, from 0.

    Returns:
        The config, or None where no class holds it, and then why.
    """
    kind = str(getattr(config, "model_type", ""))
    pairs = [pair for pair in PAIRS if pair.dense == kind]
    reasons = [] if pairs else [f"no class of mixtures is known for the model type {kind!r}"]
    for pair in pairs:
        missing = sorted(set(range(config.num_hidden_layers)) - set(layers))
        if pair.whole and missing:
            reasons.append(f"in {pair.moe} every block is a mixture, and block {missing[0]} stays dense")
            continue
        extra = {
            **pair.settings,
            pair.number: num_experts,
            "num_experts_per_tok": top_k,
            pair.width: config.intermediate_size,
        }
        if not pair.whole:
            extra |= sparse_fields(layers, config.num_hidden_layers)
        made = carry(config, pair.moe, extra, pair.neutral)
        if not isinstance(made, str):
            return made, ""
        reasons.append(made)
    return None, "; ".join(reasons)


def dense_config(config: Any) -> tuple[Any, str]:
    """The config of the dense class that holds a model of mixtures of which each became one FFN.

    Returns:
        The config, or None where no class holds it, and then why.
    """
    kind = str(getattr(config, "model_type", ""))
    reasons = []
    for pair in PAIRS:
        if pair.moe != kind:
            continue
        width = getattr(config, pair.width)
        if not pair.whole and dense_blocks(config) and config.intermediate_size != width:
            reasons.append(f"its dense blocks are {config.intermediate_size} wide and its experts {width}")
            continue
        unlike = [
            name for name, value in pair.settings.items() if name not in _MIXTURE and getattr(config, name) != value
        ]
        if unlike:
            reasons.append(f"{pair.dense} has no {unlike[0]} = {getattr(config, unlike[0])!r}")
            continue
        neutral = {**dict.fromkeys((*_MIXTURE, *pair.settings), _any), **pair.back}
        made = carry(config, pair.dense, {"intermediate_size": width}, neutral)
        if not isinstance(made, str):
            return made, ""
        reasons.append(made)
    return None, "; ".join(reasons) or f"no dense class is known for the model type {kind!r}"


def dense_blocks(config: Any) -> list[int]:
    """Numbers of the blocks that a config of Qwen's kind keeps dense."""
    step, only = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    return [index for index in range(config.num_hidden_layers) if index in only or (index + 1) % step]


def sparse_fields(layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """`decoder_sparse_step` and `mlp_only_layers` that make the blocks of `layers` mixtures: by the step where one says it."""
    wanted = sorted(set(layers))
    for step in range(1, num_layers + 1):
        if wanted == [index for index in range(num_layers) if (index + 1) % step == 0]:
            return {"decoder_sparse_step": step, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(num_layers) if i not in wanted]}


def carry(config: Any, model_type: str, extra: Mapping[str, Any], neutral: Neutral) -> Any:
    """A config of `model_type` with every field of `config`; or, as a text, why it cannot be.

    Args:
        extra: fields of the new config that `config` does not set, or sets otherwise.
        neutral: fields that the new class does not need, and whether a value changes nothing.
    """
    from transformers import CONFIG_MAPPING

    target = CONFIG_MAPPING[model_type]
    declared = {part.name for part in dataclasses.fields(type(config))}
    known = {part.name for part in dataclasses.fields(target)}
    given = {}
    for name, value in config.to_dict().items():
        if name in _METADATA or name in extra or (name == "head_dim" and value is None):
            continue
        if name in neutral:
            if not neutral[name](value):
                return f"{model_type} has no {name} = {value!r}"
            continue
        # head_dim is read where it is not declared too
        if name in declared and name not in known and name != "head_dim":
            return f"{model_type} has no {name}"
        given[name] = value
    try:
        made = target(**{**given, **extra})
    except Exception as error:  # a strict config raises errors of its own for a value that its class does not allow
        return f"{model_type} refuses the config: {' '.join(str(error).split())}"
    for name in given:
        if name in declared and (getattr(made, name) or None) != (getattr(config, name) or None):
            return f"{model_type} changes {name} from {getattr(config, name)!r} to {getattr(made, name)!r}"
    return made


def build(config: Any, like: Any) -> Any:
    """A causal model of `config` with uninitialised weights, in the dtype, mode and attention of the model `like`, on its device.

    Raises:
        SurgeryError: `not_upcyclable`: transformers cannot make it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    maker: Any = AutoModelForCausalLM
    try:
        with no_init_weights():
            model = maker.from_config(config, dtype=like.dtype, attn_implementation=like.config._attn_implementation)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise SurgeryError(f"{config.model_type}: {error}", code="not_upcyclable") from error
    model.tie_weights()  # which no_init_weights leaves out
    model.train(like.training)
    return model.to(like.device)
