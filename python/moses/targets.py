"""Which linear maps of a transformers model get a bank: found by module type and by the name they have in their family.

The names follow PEFT's convention: a target is a module whose dotted path ends with one of the names, or matches the
regular expression in full when a single string is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, ModelError

# Query, value and the FFN's projections in each family. A fused map (GPT-2's c_attn, Phi-3's qkv_proj) counts as query and value.
_LLAMA = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "value", "intermediate.dense", "output.dense")
_T5 = ("SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v", "wi", "wi_0", "wi_1", "wo")
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "olmo",
            "olmo2",
            "smollm3",
            "granite",
            "cohere",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5),
    "gpt2": ("c_attn", "c_fc", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
    "opt": ("q_proj", "v_proj", "fc1", "fc2"),
    "distilbert": ("q_lin", "v_lin", "lin1", "lin2"),
    "mpnet": ("attn.q", "attn.v", "intermediate.dense", "output.dense"),
}
# Maps that end like a target but belong to another part: BERT's attention output is no FFN.
_NOT_TARGETS = ("attention.output.dense",)


def is_linear(module: nn.Module) -> bool:
    """Whether a bank can stand beside this module: `nn.Linear`, or the transposed `Conv1D` of GPT-2."""
    return type(module) in (nn.Linear, Conv1D) or (
        isinstance(module, nn.Linear) and type(module).__module__.startswith("torch.nn")
    )


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(D_out, D_in) of a linear map."""
    first, second = module.weight.shape  # type: ignore[misc]
    return (int(second), int(first)) if isinstance(module, Conv1D) else (int(first), int(second))


def find_targets(model: nn.Module, names: tuple[str, ...] | str | None) -> list[str]:
    """Dotted paths of the linear maps to attach at, in the model's own order.

    Raises:
        ModelError: the architecture is unknown and no names are given, or it holds none of its family's maps.
        ConfigError: a name given matches no linear map, or the expression is no regular expression.
    """
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    if names is None:
        return _default_targets(model, linears)
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ConfigError(
                f"target_modules {names!r} is no regular expression: {error}", code="bad_setting"
            ) from None
        found = [path for path in linears if pattern.fullmatch(path) or _ends_with(path, names)]
        unmatched = [] if found else [names]
    else:
        found = [path for path in linears if any(_ends_with(path, name) for name in names)]
        unmatched = [name for name in names if not any(_ends_with(path, name) for path in found)]
    if unmatched:
        raise ConfigError(
            f"target_modules name {unmatched[0]!r} matches no linear map of {type(model).__name__}; it has {_kinds(linears)}",
            code="unknown_module",
        )
    return found


def block_of(path: str, model: nn.Module) -> str | None:
    """Path of the block (member of the outermost `nn.ModuleList`) that holds `path`; None where there is none."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1]) if end + 1 < len(parts) else None
    return None


def _default_targets(model: nn.Module, linears: list[str]) -> list[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    names = TARGETS.get(str(family))
    found = (
        []
        if names is None
        else [path for path in _candidates(linears) if any(_ends_with(path, name) for name in names)]
    )
    if not found:
        raise ModelError(
            f"do not know where {type(model).__name__} (model type {family!r}) keeps its query, value and FFN projections; "
            f"name them by target_modules; its linear maps are {_kinds(linears)}",
            code="unknown_architecture",
        )
    return found


def _candidates(linears: list[str]) -> Iterator[str]:
    return (path for path in linears if not any(_ends_with(path, name) for name in _NOT_TARGETS))


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _kinds(linears: list[str]) -> str:
    """The distinct names of linear maps with the block's number left out, for messages."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in linears))
    return ", ".join(kinds[:40]) + (", ..." if len(kinds) > 40 else "") if kinds else "none"


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream, from the model's config."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise ModelError(f"the config of {type(model).__name__} has no hidden_size", code="unknown_architecture")
    return size
