"""Upcycling: a dense model becomes a mixture of experts that computes the same (Komatsuzaki et al., arXiv 2212.05055).

Every expert is a copy of the FFN and the k weights of a token sum to 1, so the gate's rows, which are random, do not matter at first. Expert 0 stays
the FFN itself; the others may get noise, or a part of their neurons drawn anew (`reinit`; Nakamura et al., arXiv 2502.19261: normal, with the mean
and deviation of the weights that they replace). Where a class of transformers holds the result it is a model of that class, else of moses's layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SurgeryError
from ..routers import DenseRouter, ExpertChoiceRouter, GShardRouter, NoisyTopKRouter, SwitchRouter, TopKRouter
from ..seeds import stable_seed
from ..surgery.plan import LayerSurgery, Slot, SurgeryPlan
from .blocks import moe_blocks, parameter
from .classes import build, moe_config
from .ffns import DenseFFN, dense_ffns
from .layer import MixtureFFN
from .slots import slot_rows

# softmax over the k alone: their sum is 1 for k = 1 too
ROUTERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "topk": lambda d, e, k: TopKRouter(d, e, k, scoring="softmax_after"),
    "noisy_topk": NoisyTopKRouter,
    "gshard": lambda d, e, k: GShardRouter(d, e, random_second=False),
    "dense": lambda d, e, k: DenseRouter(d, e),
    "switch": lambda d, e, k: SwitchRouter(d, e),
    "expert_choice": lambda d, e, k: ExpertChoiceRouter(d, e, float(k)),
}
_FIXED_TOP_K = {"gshard": 2, "switch": 1}
_SCALED = {"switch": "scales its expert by its probability", "expert_choice": "leaves tokens out"}
# rounding grows with depth (5e-6 in the 30 blocks of SmolLM2-135M), a config that was not carried shows far above
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def upcycle(
    model: Any,
    num_experts: int = 8,
    *,
    every: int | None = None,
    layers: Sequence[int] | None = None,
    top_k: int = 2,
    router: str = "topk",
    noise: float = 0.0,
    reinit: float = 0.0,
    keep_dense: bool = False,
    seed: int = 0,
) -> Any:
    """A new model whose FFNs are mixtures; `model` stays as it is.

    Args:
        model: a dense decoder model of transformers.
        num_experts: E.
        every: mixtures in every n-th block, the n-th first (GLaM's 2 is the default); 1 for all.
        layers: numbers of the blocks that become mixtures, from 0, in place of `every`.
        top_k: k.
        router: `topk`, or for moses's layer `noisy_topk`, `gshard`, `dense`; with `keep_dense` also `switch` and `expert_choice`.
        noise: standard deviation of the noise on experts 1 and up, relative to that of each tensor.
        reinit: share of the neurons of experts 1 and up that are drawn anew.
        keep_dense: leave the FFN in place and add experts beside it, whose output is 0 at first.
        seed: of gates, noise and new neurons.

    Returns:
        A model of transformers of the same dtype, device and mode. Without noise and `reinit` its logits equal the model's within 1e-5 of the largest
        (float32); a result that differs by more than rounding, on a few tokens, is refused.

    Raises:
        ConfigError: `bad_setting`; `unknown_layer` for a block that is not there.
        SurgeryError: `not_upcyclable` for an FFN that cannot become experts; `not_preserved` where the result differs.
    """
    check_settings(num_experts, every, layers, top_k, router, noise, reinit, keep_dense, seed)
    ffns = dense_ffns(model)
    chosen = choose(ffns, every, layers)
    plan = upcycle_plan(chosen, num_experts, top_k, noise, seed)
    exact = keep_dense or not (noise or reinit)
    return upcycled(model, ffns, chosen, plan, router, reinit, keep_dense, exact)[0]


def upcycled(
    model: Any,
    ffns: Sequence[DenseFFN],
    chosen: Sequence[DenseFFN],
    plan: SurgeryPlan,
    router: str,
    reinit: float,
    keep_dense: bool,
    exact: bool,
) -> tuple[Any, float | None]:
    """The new model, and what `require_same` found where it is `exact`, else None. Settings as `upcycle` has checked them."""
    made = None
    if router == "topk" and not keep_dense:
        made = _as_class(model, ffns, chosen, plan, reinit)
    if made is None:
        made = _as_layers(model, chosen, plan, router, reinit, keep_dense)
    return made, require_same(model, made) if exact else None


def check_settings(
    num_experts: int,
    every: int | None,
    layers: Sequence[int] | None,
    top_k: int,
    router: str,
    noise: float,
    reinit: float,
    keep_dense: bool,
    seed: int,
) -> None:
    """Raise `ConfigError` (`bad_setting`) for settings of `upcycle` that cannot work; needs no model."""

    def refuse(text: str) -> None:
        raise ConfigError(f"upcycle: {text}", code="bad_setting")

    for name, value, least in (
        ("num_experts", num_experts, 1),
        ("top_k", top_k, 1),
        ("every", every, 1),
        ("seed", seed, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            refuse(f"{name} is {value!r}; it must be a whole number from {least}")
    if every is not None and layers is not None:
        refuse("give every or layers, not both")
    if top_k > num_experts:
        refuse(f"top_k is {top_k} and there are {num_experts} experts; a token cannot use more than there are")
    if router not in ROUTERS:
        refuse(f"router is {router!r}; it must be one of {', '.join(ROUTERS)}")
    if _FIXED_TOP_K.get(router, top_k) != top_k:
        refuse(f"the router {router} has top_k {_FIXED_TOP_K[router]}, not {top_k}")
    if router in _SCALED and not keep_dense:
        refuse(
            f"the router {router} {_SCALED[router]}, so the model would not compute the same; use topk, or keep_dense"
        )
    if not 0 <= noise < math.inf:
        refuse(f"noise is {noise!r}; it must be a number from 0")
    if not 0 <= reinit <= 1:
        refuse(f"reinit is {reinit!r}; it must be a share from 0 to 1")


def choose(ffns: Sequence[DenseFFN], every: int | None, layers: Sequence[int] | None) -> list[DenseFFN]:
    """The FFNs that become mixtures. Raises `ConfigError` (`unknown_layer`) for a block without a dense FFN, and for none at all."""
    by_number = {ffn.index: ffn for ffn in ffns}
    if layers is None:
        step = 2 if every is None else every
        chosen = [ffn for ffn in ffns if (ffn.index + 1) % step == 0]
        if not chosen:
            raise ConfigError(
                f"every is {step} and the model has {len(ffns)} blocks; no block would be a mixture",
                code="unknown_layer",
            )
        return chosen
    wrong = [number for number in layers if number not in by_number]
    if wrong or not layers:
        raise ConfigError(
            f"layers names block {wrong[0] if wrong else 'none'}; the model has dense FFNs in blocks {min(by_number)} to {max(by_number)}",
            code="unknown_layer",
        )
    return [by_number[number] for number in sorted(set(layers))]


def upcycle_plan(
    ffns: Sequence[DenseFFN], num_experts: int, top_k: int, noise: float = 0.0, seed: int = 0
) -> SurgeryPlan:
    """The plan that makes `num_experts` of each FFN: itself and copies of it."""
    slots = (Slot((0,)), *[Slot((0,), new=True, noise=noise)] * (num_experts - 1))
    return SurgeryPlan(tuple(LayerSurgery(ffn.block, 1, slots) for ffn in ffns), top_k, seed=seed)


def class_for(
    model: Any, ffns: Sequence[DenseFFN], chosen: Sequence[DenseFFN], num_experts: int, top_k: int
) -> tuple[Any, str]:
    """The config of the class of transformers that holds the upcycled model; None, and why, where it will be moses's layer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(getattr(model.config, "model_type", ""))
    if type(model).__name__ != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind):
        return None, f"{type(model).__name__} is no causal language model of the type {kind!r}"
    odd = [ffn.path for ffn in chosen if ffn.into_bias is not None or ffn.kind != "gate_up_down"]
    if odd:
        return None, f"{odd[0]} has biases or no gate"
    if len({ffn.d_ff for ffn in ffns}) > 1:
        return None, "its FFNs differ in width"
    return moe_config(model.config, [ffn.index for ffn in chosen], num_experts, top_k)


@torch.no_grad()
def expert_tensors(ffn: DenseFFN, plan: SurgeryPlan, reinit: float = 0.0) -> dict[str, Tensor]:
    """`into` (E, 2F, D) or (E, F, D), `out` (E, D, F), and `into_bias`, `out_bias` where the FFN has them, by the FFN's surgery."""
    slots = plan[ffn.block].slots
    sources = {"into": ffn.into, "out": ffn.out, "into_bias": ffn.into_bias, "out_bias": ffn.out_bias}
    fused = {
        name: slot_rows(value[None], slots, plan.seed, ffn.block, name)
        for name, value in sources.items()
        if value is not None
    }
    for expert, slot in enumerate(slots):
        if slot.new and reinit:
            generator = torch.Generator().manual_seed(stable_seed(plan.seed, ffn.block, expert, "reinit"))
            neurons = torch.randperm(ffn.d_ff, generator=generator)[: round(reinit * ffn.d_ff)].to(ffn.out.device)
            parts = fused["into"][expert].view(-1, ffn.d_ff, ffn.d_model)
            for part in parts:
                _draw(part, 0, neurons, generator)
            _draw(fused["out"][expert], 1, neurons, generator)
    return fused


def _draw(matrix: Tensor, axis: int, places: Tensor, generator: torch.Generator) -> None:
    if not places.numel():
        return
    before = matrix.index_select(axis, places).float()
    drawn = torch.randn(before.shape, generator=generator).to(before.device)
    matrix.index_copy_(axis, places, (drawn * before.std() + before.mean()).to(matrix.dtype))


def _gate_rows(block: str, num_experts: int, d_model: int, seed: int, config: Any) -> Tensor:
    generator = torch.Generator().manual_seed(stable_seed(seed, block, "gate"))
    return torch.randn(num_experts, d_model, generator=generator) * float(getattr(config, "initializer_range", 0.02))


def _as_class(
    model: Any, ffns: Sequence[DenseFFN], chosen: Sequence[DenseFFN], plan: SurgeryPlan, reinit: float
) -> Any:
    num_experts = len(plan.layers[0].slots)
    config, _ = class_for(model, ffns, chosen, num_experts, plan.top_k or 1)
    if config is None:
        return None
    made = build(config, model)
    by_block = {ffn.block: ffn for ffn in chosen}
    copy_trunk(model, made, skip=tuple(ffn.path for ffn in chosen))
    for block in moe_blocks(made):
        ffn = by_block[block.block]
        tensors = expert_tensors(ffn, plan, reinit)
        with torch.no_grad():
            parameter(made, block.into).copy_(tensors["into"])
            parameter(made, block.out).copy_(tensors["out"])
            assert block.gate is not None
            parameter(made, block.gate).copy_(_gate_rows(ffn.block, num_experts, ffn.d_model, plan.seed, config))
            for name in block.shared:
                for part in made.get_submodule(name).parameters():
                    part.zero_()
    return made


@torch.no_grad()
def copy_trunk(source: nn.Module, target: nn.Module, skip: Sequence[str]) -> None:
    """Copy every tensor of `source` that is outside of the modules `skip`; tied tensors and the generation config too.

    Raises:
        SurgeryError: `not_upcyclable`: a tensor has no place of its shape in `target`, or one of the target's has no source.
    """
    have, want = source.state_dict(), target.state_dict()
    prefixes = tuple(f"{path}." for path in skip)
    have = {name: value for name, value in have.items() if not name.startswith(prefixes)}
    missing = {name for name in want if not name.startswith(prefixes)} ^ set(have)
    unlike = [name for name in have if name in want and want[name].shape != have[name].shape]
    if missing or unlike:
        name = sorted([*missing, *unlike])[0]
        raise SurgeryError(
            f"{type(target).__name__} does not hold {name} of {type(source).__name__}", code="not_upcyclable"
        )
    target.load_state_dict(have, strict=False)
    if hasattr(source, "generation_config") and source.generation_config is not None:
        target.generation_config = copy.deepcopy(source.generation_config)


def _as_layers(
    model: Any, chosen: Sequence[DenseFFN], plan: SurgeryPlan, router: str, reinit: float, keep_dense: bool
) -> Any:
    made = copy.deepcopy(model)
    for ffn in chosen:
        like = ffn.out
        num_experts = len(plan[ffn.block].slots)
        gate: Any = ROUTERS[router](ffn.d_model, num_experts, plan.top_k or 1)
        with torch.no_grad():
            if not isinstance(gate, NoisyTopKRouter):  # starts at 0, by its paper
                gate.weight.copy_(_gate_rows(ffn.block, num_experts, ffn.d_model, plan.seed, model.config))
        layer = MixtureFFN(
            ffn.d_model,
            ffn.d_ff,
            gate,
            kind=ffn.kind,
            activation=ffn.activation,
            bias=ffn.into_bias is not None,
            dropout=ffn.dropout,
            dense=made.get_submodule(ffn.path) if keep_dense else None,
            block=ffn.block,
        )
        layer.experts.to(like.dtype)
        with torch.no_grad():
            for name, value in expert_tensors(ffn, plan, reinit).items():
                getattr(layer.experts, name).copy_(value)
            if keep_dense:
                for name in ("out", "out_bias"):
                    if hasattr(layer.experts, name):
                        getattr(layer.experts, name).zero_()
        layer.train(ffn.module.training)
        ffn.replace(made, layer.to(like.device))
    return made


@torch.no_grad()
def require_same(model: Any, made: Any, tokens: int = 16) -> float:
    """The largest difference of two models' logits on random tokens, in parts of the largest logit.

    Raises:
        SurgeryError: `not_preserved`: it is above what the dtype's rounding explains.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    found = []
    for part in (model, made):
        training = part.training
        part.eval()
        output = part(input_ids=ids)
        found.append((output.logits if hasattr(output, "logits") else output[0]).float())
        part.train(training)
    before, after = found
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-30))
    if not difference <= _TOLERANCE.get(model.dtype, 5e-2):
        raise SurgeryError(
            f"the {type(made).__name__} made of {type(model).__name__} differs by {difference:.1e} of the largest logit; it does not hold this "
            "model: report its config",
            code="not_preserved",
        )
    return difference
