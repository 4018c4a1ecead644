"""What a model has in the place of FFNs that its config does not say, as JSON, and the model of it again.

A layout is a list of places, each a dict with a `kind`:

    mixture   a `MixtureFFN`: d_model, d_ff, experts, activation, bias, dropout, dense (whether the FFN stays beside), router {name, settings}
    dense     a `PlainFFN`: d_model, d_ff, experts, activation, bias
    resized   a mixture of the model's class with another number of experts than the config: num_experts, top_k
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import routers
from ..errors import FormatError
from .blocks import config_numbers, moe_blocks, parameter, set_parameter
from .layer import BiasedExperts, MixtureFFN, PlainFFN

ROUTERS = {
    "topk": routers.TopKRouter,
    "noisy_topk": routers.NoisyTopKRouter,
    "gshard": routers.GShardRouter,
    "switch": routers.SwitchRouter,
    "dense": routers.DenseRouter,
    "expert_choice": routers.ExpertChoiceRouter,
    "random": routers.RandomRouter,
}
_NAMES = {kind: name for name, kind in ROUTERS.items()}


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The layout of a model; empty where its class and config say all.

    Raises:
        FormatError: `unknown_router`: a mixture has a router of another kind.
    """
    places: list[dict[str, Any]] = []
    blocks = {block.path: block for block in moe_blocks(model)}
    config: Any = getattr(model, "config", None)
    number = next((getattr(config, name) for name in config_numbers(config)), None)
    for path, module in model.named_modules():
        if isinstance(module, MixtureFFN):
            places.append(_mixture(path, module))
        elif isinstance(module, PlainFFN):
            width = {"d_model": module.d_model, "d_ff": module.d_ff}
            kind = {"experts": module.kind, "activation": module.activation, "bias": module.bias}
            places.append({"kind": "dense", "path": path, **width, **kind})
        elif path in blocks:
            block = blocks[path]
            if block.num_experts != number or block.top_k != getattr(config, "num_experts_per_tok", block.top_k):
                places.append({"kind": "resized", "path": path, "num_experts": block.num_experts, "top_k": block.top_k})
    return places


def _mixture(path: str, module: MixtureFFN) -> dict[str, Any]:
    experts: Any = module.experts
    return {
        "kind": "mixture",
        "path": path,
        "block": module.block,
        "d_model": module.d_model,
        "d_ff": module.d_ff,
        "experts": experts.kind,
        "activation": experts.activation,
        "bias": isinstance(experts, BiasedExperts),
        "dropout": module.dropout,
        "dense": module.dense is not None,
        "router": {"name": _router_name(path, module.router), "settings": _settings(module.router)},
    }


def _router_name(path: str, router: nn.Module) -> str:
    if type(router) not in _NAMES:
        raise FormatError(
            f"{path} has a router of {type(router).__name__}, which a folder cannot hold; it holds {', '.join(ROUTERS)}",
            code="unknown_router",
        )
    return _NAMES[type(router)]


def _settings(router: Any) -> dict[str, Any]:
    if isinstance(router, routers.RandomRouter):
        domains, vocabulary = router.table.shape
        return {"vocab_size": vocabulary, "num_domains": domains, "experts_per_group": router.experts_per_group}
    found = {}
    for name in inspect.signature(type(router).__init__).parameters:
        if name != "self":
            value = getattr(router, name)
            found[name] = value is not None if name == "bias" else value
    return found


def arrange(model: nn.Module, places: Sequence[Mapping[str, Any]]) -> None:
    """Put what `describe` found into a model of the same config; weights are not initialised.

    Raises:
        FormatError: `damaged_layout`: a place is not of the form above, or not in the model.
    """
    for place in places:
        try:
            _place(model, place)
        except FormatError:
            raise
        except Exception as error:  # outside data: whatever modules raise for it, the layout is what is wrong
            raise FormatError(
                f"layout of {str(place)[:200]}: {type(error).__name__}: {error}", code="damaged_layout"
            ) from None


def _place(model: nn.Module, place: Mapping[str, Any]) -> None:
    path, kind = place["path"], place["kind"]
    before = model.get_submodule(path)
    like = next(before.parameters())
    made: nn.Module
    if kind == "mixture":
        made = MixtureFFN(
            place["d_model"],
            place["d_ff"],
            _router(place["router"]),
            kind=place["experts"],
            activation=place["activation"],
            bias=place["bias"],
            dropout=place["dropout"],
            dense=before if place["dense"] else None,
            block=place["block"],
        )
        made.experts.to(like.dtype)
    elif kind == "dense":
        made = PlainFFN(place["d_model"], place["d_ff"], place["experts"], place["activation"], place["bias"])
        made.to(like.dtype)
    elif kind == "resized":
        resize(model, path, place["num_experts"], place["top_k"])
        return
    else:
        raise FormatError(f"layout of {path}: unknown kind {kind!r}", code="damaged_layout")
    model.set_submodule(path, made)


def resize(model: nn.Module, path: str, num_experts: int, top_k: int) -> None:
    """Give a mixture of the model's class another number of experts, whose weights are not set. Raises `FormatError` for k above E."""
    if not 1 <= top_k <= num_experts:
        raise FormatError(f"layout of {path}: top_k {top_k} of {num_experts} experts", code="damaged_layout")
    block = next(block for block in moe_blocks(model) if block.path == path)
    for name in (*block.gate_tensors, *block.expert_tensors):
        tensor = parameter(model, name)
        set_parameter(
            model, name, torch.empty(num_experts, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        )
    block.set_numbers(num_experts, top_k)


def _router(described: Mapping[str, Any]) -> nn.Module:
    name, settings = described["name"], described["settings"]
    if name not in ROUTERS:
        raise FormatError(f"layout: unknown router {name!r}; it is one of {', '.join(ROUTERS)}", code="damaged_layout")
    if name != "random":
        router: nn.Module = ROUTERS[name](**settings)
        return router
    # its constructor would draw the table that is in the file
    domains, group = settings["num_domains"], settings["experts_per_group"]
    return empty_table(domains, settings["vocab_size"], group)


def empty_table(num_domains: int, vocab_size: int, experts_per_group: int) -> routers.RandomRouter:
    """A `RandomRouter` whose table is not drawn: fill it."""
    router = routers.RandomRouter.__new__(routers.RandomRouter)
    nn.Module.__init__(router)
    router.num_experts, router.experts_per_group = num_domains * experts_per_group, experts_per_group
    router.register_buffer("table", torch.zeros(num_domains, vocab_size, dtype=torch.int64))
    return router


def own_names(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model's state once, tied ones under their first name."""
    seen: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            found[name] = tensor
    return found
