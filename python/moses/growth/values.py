"""A grown layer's experts as the registry counts them: neurons and gate rows, in bytes that can be hashed, moved between tasks and freed.

E experts of F neurons. A neuron's bytes are its rows of `into` (gate and up, or up alone) and its column of `out`; a gate row's are its float32
values. The order is the registry's canonical one: by layer, then all neurons by expert, then all gate rows by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from .growing import GrowingLayer

NEURONS, GATE = "neurons", "gate"


def spaces(layer: GrowingLayer) -> list[tuple[str, int, int]]:
    """(name, units an expert, bytes a unit), as `Registry.add_layer` takes them."""
    d_model, d_ff = (int(size) for size in layer.out.shape[1:])
    found = [(NEURONS, d_ff, (3 if layer.gated else 2) * d_model * layer.out.element_size())]
    if layer.gate is not None:
        found.append((GATE, 1, d_model * layer.gate.element_size()))
    return found


def to_bytes(layer: GrowingLayer, experts: Sequence[int]) -> Tensor:
    """(bytes,) uint8 of these frozen experts."""
    index = list(experts)
    into, out = layer.into[index], layer.out[index]
    # (E, F, 2, D): a neuron's rows together
    parts = into.view(len(index), 1 + layer.gated, out.shape[2], out.shape[1]).transpose(1, 2)
    neurons = torch.cat([parts, out.transpose(1, 2)[:, :, None]], dim=2)
    flat = [_bytes(neurons)]
    if layer.gate is not None:
        flat.append(_bytes(layer.gate[index]))
    return torch.cat(flat)


def from_bytes(layer: GrowingLayer, values: Tensor, start: int, num_experts: int) -> tuple[dict[str, Tensor], int]:
    """Experts of `values` (bytes,) uint8 from `start` on, by the names of the layer's buffers, and where the next ones start.

    Raises:
        FormatError: there are fewer bytes (`bad_tensors`).
    """
    d_model, d_ff = (int(size) for size in layer.out.shape[1:])
    rows = 3 if layer.gated else 2
    neurons, start = _take(values, start, (num_experts, d_ff, rows, d_model), layer.out.dtype)
    found = {
        "into": neurons[:, :, :-1].transpose(1, 2).flatten(1, 2).contiguous(),
        "out": neurons[:, :, -1].transpose(1, 2).contiguous(),
    }
    if layer.gate is not None:
        found["gate"], start = _take(values, start, (num_experts, d_model), layer.gate.dtype)
    return found, start


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _take(values: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    end = start + torch.Size(shape).numel() * dtype.itemsize
    if values.dtype != torch.uint8 or end > values.numel():
        raise FormatError(
            f"a task's weights are {values.numel()} bytes and {end} are needed; restore the file from a backup",
            code="bad_tensors",
        )
    return values[start:end].clone().view(dtype).view(shape), end
