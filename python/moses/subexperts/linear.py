"""A frozen linear map with a bank of masked low-rank experts beside it (design 3.1).

    y = W0 x + (alpha / R) * sum_n gate_n(x) * (B_n * m^B_n) (A_n * m^A_n) x

All components of a task are computed in one product and weighted by the gate of their expert: for low-rank experts that
is cheaper than to sort the tokens. A task's products have the same shape whatever came later, so its result keeps its bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MosesConfig
from ..context import TaskContext
from ..routers import TaskRouter
from .element import ElementBank
from .rank import RankBank

Bank = RankBank | ElementBank


def make_bank(config: MosesConfig, d_out: int, d_in: int) -> Bank:
    """An empty bank of the config's granularity."""
    dtype: torch.dtype = getattr(torch, config.weight_dtype)
    if config.granularity == "rank":
        return RankBank(d_out, d_in, config.num_experts, config.rank, config.candidates, dtype)
    return ElementBank(d_out, d_in, config.num_experts, config.rank, dtype)


class Gates:
    """Where the first linear map of a block leaves the block's gates for the others, which run after it.

    Holds nothing that outlives a forward in a copy: a pickled or deep-copied one is empty.
    """

    def __init__(self) -> None:
        self.value: tuple[Tensor, ...] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"value": None}


class SubExpertLinear(nn.Module):
    """`base_layer` plus the update of the context's tasks.

    Attributes:
        base_layer: the frozen linear map, as it was.
        bank: its experts.
        router: the router that reads this map's input, for the first map of a block; None for those that share its gates.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        bank: Bank,
        scale: float,
        context: TaskContext,
        gates: Gates,
        router: TaskRouter | None,
    ) -> None:
        super().__init__()
        self.base_layer, self.bank, self.scale = base_layer, bank, scale
        self.context, self.gates, self.router = context, gates, router

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
        y: Tensor = self.base_layer(x)
        if not self.context.groups:
            return y
        if self.router is not None:
            self.gates.value = self.router.gates(x)
        assert self.gates.value is not None, "a bank ran before the first one of its block"
        for group, gate in zip(self.context.groups, self.gates.value, strict=True):
            A, B, experts = self.bank.weights(group.task)
            if A.shape[0] == 0:
                continue
            if group.rows is None:
                y = self._update(y, x, A, B, gate[..., experts])
            else:
                rows = group.rows.to(x.device)
                part = self._update(y.index_select(0, rows), x.index_select(0, rows), A, B, gate[..., experts])
                y = y.index_copy(0, rows, part)
        return y

    def _update(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        hidden = F.linear(x, A.to(x.dtype))
        hidden = hidden * gates.to(hidden.dtype)
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B.to(y.dtype), alpha=self.scale
        )
        return flat.reshape(y.shape)
