"""The dense FFNs of a decoder model of transformers, found by what they hold and checked by what they compute.

D model width, F FFN width. A module is an FFN where it has the linear maps of a row of `LAYOUTS`, nothing else with weights, and where its output
is that of the formula of its kind: a class that merely looks like one (an activation with weights, a sparse gate) is refused, not approximated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SurgeryError
from ..ops.ffn import hide
from ..targets import block_of, is_linear
from ..transformers import ACTIVATION_OF

# linear maps into the hidden layer (gate before up), and the one out of it
LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama and its kin
    (("gate_up_proj",), "down_proj"),  # Phi-3: both in one
    (("c_fc",), "c_proj"),  # GPT-2 (transposed), StarCoder2
    (("fc1",), "fc2"),  # Phi
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("up_proj",), "down_proj"),  # Nemotron
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """A feed-forward network of one block.

    Attributes:
        path: dotted path of the module that is called with (..., D) and gives (..., D): `model.layers.3.mlp`.
        block: path of its block: `model.layers.3`, as in a `SurgeryPlan`.
        index: number of the block, from 0.
        kind: `gate_up_down` or `up_down`, as in `moses.experts`.
        activation: of `moses.ops.ACTIVATIONS`.
        d_model, d_ff: D and F.
        dropout: of its output, in training.
        module: the module itself.
    """

    path: str
    block: str
    index: int
    kind: Literal["gate_up_down", "up_down"]
    activation: str
    d_model: int
    d_ff: int
    dropout: float
    module: nn.Module

    @property
    def into(self) -> Tensor:
        """(2F, D), gate over up, or (F, D); a new tensor where the module has it in parts or transposed. Detached."""
        return torch.cat([_matrix(part) for part in _maps(self.module)[0]])

    @property
    def out(self) -> Tensor:
        """(D, F). Detached."""
        return _matrix(_maps(self.module)[1])

    @property
    def into_bias(self) -> Tensor | None:
        """(2F,) or (F,). Detached."""
        biases = [part.bias for part in _maps(self.module)[0]]
        return None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    @property
    def out_bias(self) -> Tensor | None:
        """(D,). Detached."""
        bias = _maps(self.module)[1].bias
        return None if bias is None else bias.detach()

    def load(self, into: Tensor, out: Tensor, into_bias: Tensor | None = None, out_bias: Tensor | None = None) -> None:
        """Copy tensors of the shapes above into the module."""
        parts, last = _maps(self.module)
        sizes = [_matrix(part).shape[0] for part in parts]
        with torch.no_grad():
            for part, rows in zip(parts, torch.split(into, sizes), strict=True):
                _matrix(part).copy_(rows)
            _matrix(last).copy_(out)
            if into_bias is not None:
                for part, values in zip(parts, torch.split(into_bias, sizes), strict=True):
                    part.bias.copy_(values)
            if out_bias is not None:
                last.bias.copy_(out_bias)

    def replace(self, model: nn.Module, module: nn.Module) -> None:
        """Put `module` in the FFN's place in `model`."""
        model.set_submodule(self.path, module)


def dense_ffns(model: nn.Module) -> list[DenseFFN]:
    """Every dense FFN of a decoder model, in the order of its blocks; those inside of a mixture (shared experts) are none.

    Raises:
        SurgeryError: `not_upcyclable`: the model is no decoder, has no FFN that is a module of a known layout, or one that computes something else.
    """
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise SurgeryError(f"{name} is an encoder with a decoder; give a decoder model", code="not_upcyclable")
    found = []
    for path, module in model.named_modules():
        block = block_of(path, model) if path else None
        number = (block or "").rpartition(".")[2]
        if block is None or not number.isdigit() or not _looks_dense(module) or _inside_mixture(model, path, block):
            continue
        found.append(_checked(path, block, int(number), module))
    if not found and any(isinstance(getattr(module, "experts", None), nn.Module) for module in model.modules()):
        raise SurgeryError(f"{name} has no dense FFN left: its blocks are mixtures of experts", code="not_upcyclable")
    if not found:
        raise SurgeryError(
            f"{name} (model type {getattr(config, 'model_type', None)!r}) has no FFN that is a module with "
            f"{', '.join('+'.join((*parts, last)) for parts, last in LAYOUTS)}; give a model of such a family",
            code="not_upcyclable",
        )
    if len({ffn.block.rpartition(".")[0] for ffn in found}) > 1:
        stacks = sorted({ffn.block.rpartition(".")[0] for ffn in found})
        raise SurgeryError(
            f"{name} has FFNs in several stacks of blocks ({', '.join(stacks)}); give the language model alone",
            code="not_upcyclable",
        )
    twice = [a.block for a, b in itertools.pairwise(found) if a.block == b.block]
    if twice:
        raise SurgeryError(f"{name}: {twice[0]} has two FFNs; one is expected", code="not_upcyclable")
    return found


def _looks_dense(module: nn.Module) -> bool:
    names = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    return any(names == {*parts, last} for parts, last in LAYOUTS) and all(
        is_linear(getattr(module, name)) for name in names
    )


def _inside_mixture(model: nn.Module, path: str, block: str) -> bool:
    parent = path.rpartition(".")[0]
    while len(parent) > len(block):
        if hasattr(model.get_submodule(parent), "experts"):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _maps(module: nn.Module) -> tuple[Sequence[Any], Any]:
    for parts, last in LAYOUTS:
        if all(hasattr(module, name) for name in (*parts, last)):
            return [getattr(module, name) for name in parts], getattr(module, last)
    raise AssertionError(type(module))


def _matrix(linear: Any) -> Tensor:
    """(D_out, D_in), a view of the map's weight."""
    weight: Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _checked(path: str, block: str, index: int, module: nn.Module) -> DenseFFN:
    parts, last = _maps(module)
    act = next((getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None)
    activation = ACTIVATION_OF.get(type(act))
    if activation is None:
        raise SurgeryError(
            f"{path} ({type(module).__name__}) has the activation {type(act).__name__}, which experts do not have; they have "
            f"{', '.join(sorted(set(ACTIVATION_OF.values())))}",
            code="not_upcyclable",
        )
    d_model, d_ff = _matrix(last).shape
    wide = sum(_matrix(part).shape[0] for part in parts)
    if wide not in (d_ff, 2 * d_ff) or len({part.bias is None for part in parts}) > 1:
        raise SurgeryError(
            f"{path} ({type(module).__name__}) has {wide} rows into a hidden layer of {d_ff}", code="not_upcyclable"
        )
    drop = getattr(module, "dropout", getattr(module, "residual_dropout", 0.0))
    dropout = float(drop.p) if isinstance(drop, nn.Dropout) else float(drop)
    kind: Literal["gate_up_down", "up_down"] = "up_down" if wide == d_ff else "gate_up_down"
    ffn = DenseFFN(path, block, index, kind, activation, d_model, d_ff, dropout, module)
    _probe(ffn)
    return ffn


@torch.no_grad()
def _probe(ffn: DenseFFN) -> None:
    """Compare the module with the formula on two random rows."""
    weight = ffn.out
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, ffn.d_model, generator=generator).to(weight.device, weight.dtype)
    training = {part: part.training for part in ffn.module.modules()}
    ffn.module.eval()
    try:
        found: Tensor = ffn.module(x)
    finally:
        for part, mode in training.items():
            part.training = mode
    hidden = hide(F.linear(x, ffn.into, ffn.into_bias), ffn.activation, ffn.kind == "gate_up_down")
    expected = F.linear(hidden, weight, ffn.out_bias)
    limit = _TOLERANCE.get(weight.dtype, 0.0) * float(expected.abs().max())
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= limit:
        raise SurgeryError(
            f"{ffn.path} ({type(ffn.module).__name__}) computes something else than {ffn.kind} with {ffn.activation}; it cannot become experts",
            code="not_upcyclable",
        )
