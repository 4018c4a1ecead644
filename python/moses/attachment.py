"""Put a bank of sub-experts beside the linear maps (and FFNs) of a transformers model, and take them out again.

The model stays a transformers model of its own class, with the task face of `MosesModel` mixed in.
"""

from __future__ import annotations

import re

from torch import nn

from . import _core
from .attached import MosesModel, mix_in, take_out
from .config import MosesConfig
from .context import TaskContext
from .errors import ModelError
from .heads import install_head
from .routers import TaskRouter
from .seeds import stable_seed
from .subexperts import Gates, SubExpertFFN, SubExpertLayer, SubExpertLinear, make_bank
from .targets import FFN, block_of, find_places, linear_shape

# Keys and values of cross-attention read the encoder's tokens, not those of the block they stand in.
_OTHER_TOKENS = re.compile(
    r"(^|.*\.)(EncDecAttention|crossattention|encoder_attn|cross_attn)\.(.*\.)?(k|v|key|value|k_proj|v_proj)$"
)


def attach(model: nn.Module, config: MosesConfig | None = None) -> MosesModel:
    """Attach MoSEs (arXiv 2511.06237) to `model`, in place.

    Every parameter of the model is frozen (`requires_grad=False`); the banks are empty, so the model answers as before
    until a task is begun.

    Args:
        model: any transformers model with linear maps.
        config: see `MosesConfig`.

    Returns:
        The same object, with `begin_task`, `end_task`, `task`, `save` and `registry`.

    Raises:
        ModelError: the model has sub-experts already, or it is not known where they belong.
        ConfigError: a name of `target_modules` matches nothing.
    """
    config = config or MosesConfig()
    if isinstance(model, MosesModel):
        raise ModelError("the model has sub-experts already; use moses.detach(model) first", code="already_attached")
    linears, ffns = find_places(model, config.target_modules, config.ffn_experts)
    by_path: dict[str, FFN | None] = dict.fromkeys(linears) | {ffn.path: ffn for ffn in ffns}
    paths = [path for path, _ in model.named_modules() if path in by_path]
    context = TaskContext()
    registry = _core.Registry()
    model.requires_grad_(False)
    head = install_head(model, context, config.head_norm)
    gates: dict[str, Gates] = {}
    routers: dict[str, TaskRouter] = {}
    banks: dict[str, SubExpertLayer] = {}
    for path in paths:
        base, ffn = model.get_submodule(path), by_path[path]
        d_out, d_in = linear_shape(base) if ffn is None else (ffn.d_model, ffn.d_model)
        bank = make_bank(config, d_out, d_in, None if ffn is None else expert_width(config.rank, ffn))
        registry.add_layer(path, config.num_experts, bank.spaces)
        block = block_of(path, model) if config.router == "block" and not _OTHER_TOKENS.match(path) else None
        place = block or path
        router = None
        if place not in gates:
            gates[place] = Gates()
            seed = stable_seed(config.seed, "router", place)
            router = routers[place] = TaskRouter(
                place, d_in, config.num_experts, config.top_k, config.router_dim, seed, context
            )
        layer: SubExpertLayer
        if ffn is None:
            layer = SubExpertLinear(base, bank, config.scale, context, gates[place], router)
        else:
            layer = SubExpertFFN(base, bank, config.scale, context, gates[place], router, config.top_k)
        model.set_submodule(path, layer.to(next(base.parameters()).device))
        banks[path] = layer
    return mix_in(model, config, context, registry, banks, routers, head)


def expert_width(rank: int, ffn: FFN) -> int:
    """Neurons of an FFN expert: those that take the bytes of `rank` components beside each of the FFN's maps, at least one.

    So a bank holds the same, and `density` means the same, whichever kind of experts stands at the FFN.
    """
    return max(1, rank * sum(d_out + d_in for d_out, d_in in ffn.shapes) // (2 * ffn.d_model))


def detach(model: MosesModel) -> nn.Module:
    """Take every bank, router and head out of `model`, in place: the base model as it was, of its own class, all frozen."""
    for path, layer in model._banks().items():
        model.set_submodule(path, layer.base_layer)
    if model._head is not None:
        head_path, (original,) = model._head.replaced
        model.set_submodule(head_path, original)
        model.set_labels(original.out_features)
    return take_out(model)
