"""The mixtures of experts of a model in memory: where their gate and their experts are, whatever the class calls them.

E experts, D model width, F expert width. Every tensor named here has the experts on its first axis, so that surgery takes and adds rows and need not
know what they mean: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE, FlexOlmo, DeepSeek-V2 and V3, GptOss, and moses's own layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import SurgeryError
from ..routers import RandomRouter
from ..targets import block_of

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("top_k", "num_experts_per_tok")
# a config of transformers keeps the number under one of these, its other names being aliases
_CONFIG_NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, eq=False)
class MoEBlock:
    """A mixture of experts in one block. Names of tensors are full, as in the model's `state_dict`.

    Attributes:
        path: path of the mixture's module: `model.layers.3.mlp`.
        block: path of the block: `model.layers.3`, as in a `SurgeryPlan`.
        index: number of the block, from 0.
        num_experts: E.
        top_k: k.
        normalised: whether the k weights are divided by their sum.
        gate: (E, D), the gate's rows; None where a table routes (PanGu-Sigma).
        noise_gate: (E, D), the rows of the noise's deviation (noisy top-k); None without.
        gate_bias: (E,), added to the gate's logits (GptOss); None without.
        selection_bias: (E,), added for the choice alone (DeepSeek-V3); None without.
        into: (E, 2F, D), or (E, D, 2F) where `transposed`.
        out: (E, D, F), or (E, F, D) where `transposed`.
        into_bias, out_bias: (E, 2F) and (E, D); None without.
        transposed: GptOss's order of axes.
        interleaved: whether rows of gate and up alternate (GptOss) rather than gate over up.
        shared: paths of the modules that every token passes, and of their gate; empty without.
        module: the module itself.
    """

    path: str
    block: str
    index: int
    num_experts: int
    top_k: int
    normalised: bool
    gate: str | None
    noise_gate: str | None
    gate_bias: str | None
    selection_bias: str | None
    into: str
    out: str
    into_bias: str | None
    out_bias: str | None
    transposed: bool
    interleaved: bool
    shared: tuple[str, ...]
    module: nn.Module

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """Names of the experts' tensors: experts on axis 0."""
        names = (self.into, self.out, self.into_bias, self.out_bias)
        return tuple(name for name in names if name is not None)

    @property
    def gate_tensors(self) -> tuple[str, ...]:
        """Names of the gate's tensors: experts on axis 0."""
        return tuple(
            name for name in (self.gate, self.noise_gate, self.gate_bias, self.selection_bias) if name is not None
        )

    def set_numbers(self, num_experts: int, top_k: int) -> None:
        """Write E and k into the module's attributes, once its tensors have been cut or grown."""
        for _, part in self.module.named_modules():
            for names, value in ((_NUMBERS, num_experts), (_TOP_K, top_k)):
                for name in names:
                    if isinstance(part.__dict__.get(name), int):
                        setattr(part, name, value)


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """Every mixture of a model, in the order of its blocks; none for a dense model.

    Raises:
        SurgeryError: `unknown_mixture`: a module has experts and a gate in a form that is not known.
    """
    found = []
    for path, module in model.named_modules():
        experts = getattr(module, "experts", None)
        block = block_of(path, model) if path else None
        number = (block or "").rpartition(".")[2]
        if not isinstance(experts, nn.Module) or block is None or not number.isdigit():
            continue
        found.append(describe(model, path, block, int(number)))
    return found


def config_numbers(config: Any) -> Iterator[str]:
    """The attributes of a config that hold the number of experts: each of them that it has, aliases too."""
    return (name for name in _CONFIG_NUMBERS if hasattr(config, name))


def parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    parent, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), last)
    return tensor


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter (trained as the one before) or a buffer of another shape in the place of `name`."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    before = getattr(module, last)
    if isinstance(before, nn.Parameter):
        setattr(module, last, nn.Parameter(value, requires_grad=before.requires_grad))
    else:
        setattr(module, last, value)


def describe(model: nn.Module, path: str, block: str, index: int) -> MoEBlock:
    """The mixture at `path`. Raises `SurgeryError` (`unknown_mixture`)."""
    module = model.get_submodule(path)
    experts: Any = module.experts
    gate_name = next((name for name in ("gate", "router") if isinstance(getattr(module, name, None), nn.Module)), None)
    gate: Any = None if gate_name is None else getattr(module, gate_name)
    weight = getattr(gate, "weight", None)
    into, out = _named(experts, ("gate_up_proj", "up_proj", "into")), _named(experts, ("down_proj", "out"))
    has_gate = isinstance(weight, Tensor) and weight.ndim == 2
    if not (has_gate or isinstance(gate, RandomRouter)) or into is None or out is None:
        raise SurgeryError(
            f"{path} ({type(module).__name__}) has experts of {type(experts).__name__} and a gate of {type(gate).__name__}, a form that moses "
            "does not know: give a model whose experts are fused, with a gate of one row an expert",
            code="unknown_mixture",
        )

    def full(prefix: str, owner: Any, name: str) -> str | None:
        return f"{path}.{prefix}.{name}" if isinstance(getattr(owner, name, None), Tensor) else None

    num_experts = int(gate.weight.shape[0] if has_gate else gate.num_experts)
    top_k = next((int(getattr(part, name)) for part in (gate, module) for name in _TOP_K if hasattr(part, name)), None)
    sizes = {int(getattr(experts, name).shape[0]) for name in (into, out)}
    if top_k is None or sizes != {num_experts}:
        raise SurgeryError(
            f"{path} has {num_experts} gate rows for experts {sizes} and top-k {top_k}", code="unknown_mixture"
        )
    shared = tuple(
        f"{path}.{name}"
        for name in ("shared_expert", "shared_experts", "shared_expert_gate")
        if isinstance(getattr(module, name, None), nn.Module)
    )
    return MoEBlock(
        path,
        block,
        index,
        num_experts,
        top_k,
        bool(getattr(gate, "norm_topk_prob", getattr(gate, "normalise", not hasattr(gate, "routed_scaling_factor")))),
        f"{path}.{gate_name}.weight" if has_gate else None,
        full(str(gate_name), gate, "noise_weight"),
        full(str(gate_name), gate, "bias") if not hasattr(gate, "update_bias") else None,
        full(str(gate_name), gate, "e_score_correction_bias")
        or (full(str(gate_name), gate, "bias") if hasattr(gate, "update_bias") else None),
        f"{path}.experts.{into}",
        f"{path}.experts.{out}",
        full("experts", experts, f"{into}_bias"),
        full("experts", experts, f"{out}_bias"),
        bool(getattr(experts, "is_transposed", False)),
        not bool(getattr(experts, "is_concatenated", True)),
        shared,
        module,
    )


def _named(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if getattr(getattr(module, name, None), "ndim", 0) == 3), None)
