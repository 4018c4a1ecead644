"""A `Slot` of a surgery plan in numbers: the tensors of a layer's experts after surgery, from those before.

E experts before, S slots after. Every tensor has the experts on its first axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..seeds import stable_seed
from ..surgery.plan import Slot


@torch.no_grad()
def slot_rows(tensor: Tensor, slots: Sequence[Slot], *seed: object, inputs: int | None = -1) -> Tensor:
    """(S, ...) of `tensor` (E, ...): kept rows bit for bit, copies (with noise), averages, and fresh rows.

    Noise is relative to the standard deviation of the row that it is put on. A fresh row is normal with deviation fan-in^-1/2, as a new
    expert of `moses.experts` and a new row of a gate. An average is taken in float32 or wider.

    Args:
        tensor: floats.
        slots: their sources are rows of `tensor`.
        seed: names that, with the slot's place, give the seed of what is drawn.
        inputs: the axis of the inputs, whose length is the fan-in; None where fresh rows are 0, as biases are.
    """
    rows = tensor.new_empty((len(slots), *tensor.shape[1:]))
    for place, slot in enumerate(slots):
        if not slot.sources:
            rows[place] = _fresh(rows[place], stable_seed(*seed, place), inputs)
        elif len(slot.sources) == 1 and slot.weights in ((), (1.0,)):
            rows[place] = tensor[slot.sources[0]]
        else:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            weights = torch.tensor(slot.weights, dtype=wide, device=tensor.device)
            rows[place] = torch.tensordot(weights, tensor[list(slot.sources)].to(wide), dims=1).to(tensor.dtype)
        if slot.noise and rows[place].numel() > 1:
            wide_row = rows[place].float()
            noise = _normal(wide_row, stable_seed(*seed, place)) * (slot.noise * wide_row.std())
            rows[place] = (wide_row + noise).to(tensor.dtype)
    return rows


@torch.no_grad()
def slot_state(tensor: Tensor, slots: Sequence[Slot]) -> Tensor:
    """(S, ...) of an optimizer's state (E, ...): carried over for the experts that are kept, 0 for all others."""
    rows = tensor.new_zeros((len(slots), *tensor.shape[1:]))
    for place, slot in enumerate(slots):
        if slot.kept:
            rows[place] = tensor[slot.sources[0]]
    return rows


def _fresh(like: Tensor, seed: int, inputs: int | None) -> Tensor:
    if inputs is None or like.ndim == 0:
        return torch.zeros_like(like)
    deviation = float(like.shape[inputs]) ** -0.5
    drawn: Tensor = (_normal(like.float(), seed) * deviation).to(like.dtype)
    return drawn


def _normal(like: Tensor, seed: int) -> Tensor:
    """Standard normal values of like's shape, the same on every device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
