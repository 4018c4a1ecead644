"""Lowering the rank of an ended LoRA adapter: its weakest directions go, by the singular values of each B·A (Eckart and Young 1936)."""

from __future__ import annotations

import torch
from torch import Tensor

_A, _B = ".lora_A.weight", ".lora_B.weight"


def rank_of(tensors: dict[str, Tensor]) -> int:
    """R of an adapter's tensors, by PEFT's own names."""
    return next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_A))


def bytes_per_rank(tensors: dict[str, Tensor]) -> int:
    """Bytes of one rank component at all of the adapter's maps."""
    sizes = [tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name.endswith((_A, _B))]
    return sum(sizes) // rank_of(tensors)


def energies(tensors: dict[str, Tensor]) -> Tensor:
    """(R,) float64 sums over the maps of the squared singular values of B·A, the largest of each map first."""
    return torch.stack([_svd(A, B)[1].square() for A, B in _pairs(tensors).values()]).sum(dim=0)


def truncated(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The adapter whose B·A is the nearest of `rank` to this one's, at every map; other tensors stay."""
    made = dict(tensors)
    for stem, (A, B) in _pairs(tensors).items():
        left, values, right = _svd(A, B)
        root = values[:rank].sqrt()
        made[stem + _A] = (root[:, None] * right[:rank]).to(A.dtype).contiguous()
        made[stem + _B] = (left[:, :rank] * root).to(B.dtype).contiguous()
    return made


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    stems = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    return {stem: (tensors[stem + _A], tensors[stem + _B]) for stem in sorted(stems)}


def _svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (D_out, R), S (R,) and V^T (R, D_in) of B·A in float64, by way of two small factors."""
    q_out, r_out = torch.linalg.qr(B.double())
    q_in, r_in = torch.linalg.qr(A.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    return q_out @ u, s, vh @ q_in.T
