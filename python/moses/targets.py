"""Which linear maps of a transformers model get a bank: found by module type and by the name they have in their family.

The names follow PEFT's convention: a target is a module whose dotted path ends with one of the names, or matches the
regular expression in full when a single string is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, ModelError


@dataclass(frozen=True)
class Family:
    """What the parts of a block are called in a family of models.

    Attributes:
        attention: query and value. A fused map (GPT-2's c_attn, Phi-3's qkv_proj) counts as both.
        projections: the linear maps of the FFN.
        ffn: the module beside which a mixture of FFN experts stands: the FFN, called with its input, or in BERT-like models, whose FFN
            is split, the module that holds its second map, called with the hidden layer and the FFN's input. None where there is neither.
    """

    attention: tuple[str, ...]
    projections: tuple[str, ...]
    ffn: str | None


@dataclass(frozen=True)
class FFN:
    """A feed-forward network in a model.

    Attributes:
        path: dotted path of `Family.ffn`.
        d_model: D, width of its input and output.
        shapes: (D_out, D_in) of each of its linear maps.
    """

    path: str
    d_model: int
    shapes: tuple[tuple[int, int], ...]


_LLAMA = Family(("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), "mlp")
_BERT = Family(("query", "value"), ("intermediate.dense", "output.dense"), "output")
_T5 = Family(
    ("SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v"),
    ("wi", "wi_0", "wi_1", "wo"),
    "DenseReluDense",
)
FAMILIES: dict[str, Family] = {
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
    "gpt2": Family(("c_attn",), ("c_fc", "mlp.c_proj"), "mlp"),
    "gpt_neox": Family(("query_key_value",), ("dense_h_to_4h", "dense_4h_to_h"), "mlp"),
    "phi": Family(("q_proj", "v_proj"), ("fc1", "fc2"), "mlp"),
    "phi3": Family(("qkv_proj",), ("gate_up_proj", "down_proj"), "mlp"),
    "opt": Family(("q_proj", "v_proj"), ("fc1", "fc2"), None),
    "distilbert": Family(("q_lin", "v_lin"), ("lin1", "lin2"), "ffn"),
    "mpnet": Family(("attn.q", "attn.v"), ("intermediate.dense", "output.dense"), "output"),
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


def find_places(
    model: nn.Module, names: tuple[str, ...] | str | None, ffn_experts: str | None
) -> tuple[list[str], list[FFN]]:
    """The linear maps and the FFNs of `model` that get a bank, by `MosesConfig.target_modules` and `ffn_experts`.

    Raises:
        ModelError, ConfigError: as `find_targets` and `find_ffns`.
    """
    paths = find_targets(model, names, attention_only=ffn_experts is not None)
    return paths, [] if ffn_experts is None else find_ffns(model, paths)


def find_targets(model: nn.Module, names: tuple[str, ...] | str | None, *, attention_only: bool = False) -> list[str]:
    """Dotted paths of the linear maps to attach at, in the model's own order.

    Args:
        model: a transformers model, with no bank yet.
        names: as `MosesConfig.target_modules`; None takes those of the family.
        attention_only: leave out the FFN's maps where `names` is None.

    Raises:
        ModelError: the architecture is unknown and no names are given, or it holds none of its family's maps.
        ConfigError: a name given matches no linear map, or the expression is no regular expression.
    """
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    if names is None:
        return _default_targets(model, linears, attention_only)
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


def find_ffns(model: nn.Module, targets: list[str]) -> list[FFN]:
    """The FFNs of the model, in its own order; `targets` are the linear maps that get a bank, of which none may be an FFN's.

    Raises:
        ModelError: it is not known where the architecture keeps its FFNs, or they are no modules that something can stand beside.
        ConfigError: a target is a map of an FFN.
    """
    name = type(model).__name__
    kind, family = _family(model)
    if family is None or family.ffn is None:
        known = ", ".join(key for key, value in FAMILIES.items() if value.ffn is not None)
        what = "has no module that is its FFN" if family else "is not known to moses"
        raise ModelError(
            f'ffn_experts="adapter" has no place in {name}: model type {kind!r} {what}; use ffn_experts=None, or a model of the '
            f"types {known}",
            code="unknown_architecture",
        )
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    maps = [path for path in _candidates(linears) if any(_ends_with(path, part) for part in family.projections)]
    found = []
    for path, _ in model.named_modules():
        parent = path.rpartition(".")[0]
        if not _ends_with(path, family.ffn) or parent.endswith("attention"):
            continue
        inside = [part for part in maps if part.startswith(parent + ".")]
        if inside:
            shapes = tuple(linear_shape(model.get_submodule(part)) for part in inside)
            found.append(FFN(path, shapes[-1][0], shapes))
    if not found:
        raise ModelError(
            f'ffn_experts="adapter" has no place in {name}: model type {kind!r} keeps its FFN at {family.ffn}, and there is none; '
            f"its linear maps are {_kinds(linears)}",
            code="unknown_architecture",
        )
    for path in targets:
        if path in maps:
            raise ConfigError(
                f'target_modules takes {path}, a map of the FFN, where ffn_experts="adapter" puts experts of its own; name maps of '
                "the attention only, or use ffn_experts=None",
                code="bad_setting",
            )
    return found


def _default_targets(model: nn.Module, linears: list[str], attention_only: bool) -> list[str]:
    kind, family = _family(model)
    names = () if family is None else family.attention if attention_only else family.attention + family.projections
    found = [path for path in _candidates(linears) if any(_ends_with(path, name) for name in names)]
    if not found:
        raise ModelError(
            f"do not know where {type(model).__name__} (model type {kind!r}) keeps its query, value and FFN projections; "
            f"name them by target_modules; its linear maps are {_kinds(linears)}",
            code="unknown_architecture",
        )
    return found


def _family(model: nn.Module) -> tuple[str | None, Family | None]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind, FAMILIES.get(str(kind))


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
