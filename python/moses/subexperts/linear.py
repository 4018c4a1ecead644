"""A frozen linear map with a bank of masked low-rank experts beside it (design 3.1).

    y = W0 x + (alpha / R) * sum_n gate_n(x) * (B_n * m^B_n) (A_n * m^A_n) x

All components of a task are computed in one product and weighted by the gate of their expert: for low-rank experts that
is cheaper than to sort the tokens. A task's products have the same shape whatever came later, so its result keeps its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import SubExpertLayer


class SubExpertLinear(SubExpertLayer):
    """A linear map plus the update of the context's tasks."""

    @property
    def weight(self) -> Tensor:
        """The frozen map's weight; models that look at a projection's weight (its dtype, its device) still find it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen map's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., D_in) to (batch, ..., D_out)."""
        return self.add_update(self.base_layer(x), x)

    def _update(self, y: Tensor, x: Tensor, task: int, gates: Tensor) -> Tensor:
        A, B, experts = self.bank.weights(task)
        if A.shape[0] == 0:
            return y
        hidden = F.linear(x, A.to(x.dtype))
        hidden = hidden * gates[..., experts].to(hidden.dtype)
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B.to(y.dtype), alpha=self.scale
        )
        return flat.reshape(y.shape)
