"""Puts growing layers in the places of a model's FFNs or mixtures.

A dense FFN becomes the first, frozen expert of its layer, so that the model computes what it did; a mixture's experts and gate rows become the
frozen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError
from ..experts import settings
from ..routers import TopKRouter
from ..seeds import stable_seed
from .blocks import MoEBlock, moe_blocks, parameter
from .context import GrowthContext
from .ffns import DenseFFN, dense_ffns
from .growing import GrowingLayer
from .layer import MixtureFFN

# mixtures whose weights are a softmax over all experts, normalised over the k or not
_SOFTMAX = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo")


def growing_places(
    model: nn.Module, *, mixtures: bool, every: int = 1, upper: float = 1.0, layers: Sequence[int] | None = None
) -> list[DenseFFN] | list[MoEBlock]:
    """The FFNs, or with `mixtures`, where the model has any, its mixtures, whose places are taken.

    Args:
        model: a decoder of transformers.
        mixtures: whether a model's mixtures are taken, all of them.
        every: of the FFNs every second, say: those of blocks every - 1, 2·every - 1, ... (GLaM, arXiv 2112.06905).
        upper: the share of the blocks, the upper ones, that is taken (PanGu-Σ).
        layers: numbers of blocks, in place of `every` and `upper`.

    Raises:
        SurgeryError: the model has no place (`not_upcyclable`), a block is not there (`unknown_layer`), or a mixture is of another kind
            (`unknown_mixture`).
    """
    found = moe_blocks(model) if mixtures else []
    if found:
        for block in found:
            _require_softmax(model, block)
        return found
    ffns = dense_ffns(model)
    numbers = [ffn.index for ffn in ffns]
    if layers is not None:
        unknown = sorted(set(layers) - set(numbers))
        if unknown:
            raise SurgeryError(f"layers has {unknown[0]}; blocks with an FFN are {numbers}", code="unknown_layer")
        ffns = [ffn for ffn in ffns if ffn.index in layers]
    else:
        ffns = ffns[len(ffns) - max(1, round(upper * len(ffns))) :]
        ffns = [ffn for place, ffn in enumerate(ffns) if place % every == every - 1] or ffns[-1:]
    for ffn in ffns:
        if ffn.into_bias is not None or ffn.out_bias is not None:
            raise SurgeryError(
                f"{ffn.path} ({type(ffn.module).__name__}) has biases, which growing layers do not have yet; give a model without",
                code="not_upcyclable",
            )
    return ffns


def install(
    model: nn.Module,
    places: Sequence[DenseFFN] | Sequence[MoEBlock],
    context: GrowthContext,
    *,
    random: bool = False,
    top_k: int = 2,
    balance_weight: float = 0.01,
    seed: int = 0,
) -> dict[str, GrowingLayer]:
    """Put a growing layer in every place; the layers by their paths, in the order of the blocks.

    Args:
        random: route by token id and domain; else by a learned gate, whose row for a dense FFN is drawn from `seed`.
        top_k: for dense FFNs; a mixture keeps its own.
    """
    config: Any = model.config
    found = {}
    for place in places:
        if isinstance(place, MoEBlock):
            layer = _of_mixture(model, place, context, balance_weight)
        else:
            generator = torch.Generator().manual_seed(stable_seed(seed, "gate", place.path))
            row = torch.randn((1, place.d_model), generator=generator) * place.d_model**-0.5
            into = place.into
            layer = GrowingLayer(
                into[None],
                place.out[None],
                None if random else row.to(into.device),
                path=place.path,
                context=context,
                top_k=top_k,
                activation=place.activation,
                gated=place.kind == "gate_up_down",
                balance_weight=balance_weight,
                vocab_size=int(config.get_text_config().vocab_size) if random else 0,
            )
        layer.train(place.module.training)
        model.set_submodule(place.path, layer)
        found[place.path] = layer
    if any(isinstance(place, MoEBlock) for place in places):
        config.output_router_logits = False  # the layers' own balance loss is in its place
    return found


def _of_mixture(model: nn.Module, block: MoEBlock, context: GrowthContext, balance_weight: float) -> GrowingLayer:
    parts = {path.rpartition(".")[2]: model.get_submodule(path) for path in block.shared}
    gated, normalised = True, block.normalised
    if isinstance(block.module, MixtureFFN):
        router: Any = block.module.router
        experts: Any = block.module.experts
        parts = {"shared_expert": block.module.dense} if isinstance(block.module.dense, nn.Module) else {}
        gated, _ = settings(experts.kind, experts.activation)
        # the weight of a single expert is its share of all (TopKRouter), unless the softmax is over the k alone
        normalised = router.scoring == "softmax_after" or (router.normalise and block.top_k > 1)
    return GrowingLayer(
        parameter(model, block.into),
        parameter(model, block.out),
        parameter(model, str(block.gate)),
        path=block.path,
        context=context,
        top_k=block.top_k,
        activation=_activation(block),
        gated=gated,
        normalise=normalised,
        balance_weight=balance_weight,
        shared=parts.get("shared_expert"),
        shared_gate=parts.get("shared_expert_gate"),
    )


def _activation(block: MoEBlock) -> str:
    from ..transformers import ACTIVATION_OF

    if isinstance(block.module, MixtureFFN):
        own: Any = block.module.experts
        return str(own.activation)
    act: Any = getattr(block.module.experts, "act_fn", None)
    name = ACTIVATION_OF.get(type(act))
    if name is None:
        raise SurgeryError(
            f"{block.path} has the activation {type(act).__name__}, unknown to experts", code="unknown_mixture"
        )
    return name


def _require_softmax(model: nn.Module, block: MoEBlock) -> None:
    config: Any = model.config
    kind = config.get_text_config().model_type
    odd = (
        block.gate is None
        or block.noise_gate
        or block.gate_bias
        or block.selection_bias
        or block.into_bias
        or block.transposed
    )
    known = _is_softmax(block.module) if isinstance(block.module, MixtureFFN) else kind in _SOFTMAX
    if odd or not known:
        raise SurgeryError(
            f"{block.path}: a mixture of {kind!r} cannot be continued: its gate or experts are of another kind; "
            f"give one of {', '.join(_SOFTMAX)}, or one of moses's with the router topk and without biases",
            code="unknown_mixture",
        )
    _activation(block)


def _is_softmax(layer: MixtureFFN) -> bool:
    router = layer.router
    return (
        isinstance(router, TopKRouter)
        and router.scoring != "sigmoid"
        and router.scale == 1.0
        and router.num_groups == 1
        and not layer.dropout
    )
