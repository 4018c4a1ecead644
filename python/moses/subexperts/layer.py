"""A frozen module with a bank beside it: which rows of the batch get which task's update, and by which gates."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..config import MosesConfig
from ..context import TaskContext
from ..routers import TaskRouter
from .element import ElementBank
from .rank import RankBank

Bank = RankBank | ElementBank


def make_bank(config: MosesConfig, d_out: int, d_in: int, rank: int | None = None) -> Bank:
    """An empty bank of the config's granularity; of another rank than the config's it has as many more candidates."""
    dtype: torch.dtype = getattr(torch, config.weight_dtype)
    rank = config.rank if rank is None else rank
    if config.granularity == "rank":
        candidates = max(1, config.candidates * rank // config.rank)
        return RankBank(d_out, d_in, config.num_experts, rank, candidates, dtype)
    return ElementBank(d_out, d_in, config.num_experts, rank, dtype)


class Gates:
    """Where the first layer of a block leaves the block's gates for the others, which run after it.

    Holds nothing that outlives a forward in a copy: a pickled or deep-copied one is empty.
    """

    def __init__(self) -> None:
        self.value: tuple[Tensor, ...] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"value": None}


class SubExpertLayer(nn.Module):
    """`base_layer` plus the update of the context's tasks.

    Attributes:
        base_layer: the frozen module, as it was.
        bank: its experts.
        router: the router that reads this layer's input, for the first layer of a block; None for those that share its gates.
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

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` (batch, ..., D_out) plus what the tasks' experts make of `x` (batch, ..., D_in), each row for its own task."""
        if not self.context.groups:
            return y
        if self.router is not None:
            self.gates.value = self.router.gates(x)
        assert self.gates.value is not None, "a bank ran before the first one of its block"
        for group, gate in zip(self.context.groups, self.gates.value, strict=True):
            if group.rows is None:
                y = self._update(y, x, group.task, gate)
            else:
                rows = group.rows.to(x.device)
                part = self._update(y.index_select(0, rows), x.index_select(0, rows), group.task, gate)
                y = y.index_copy(0, rows, part)
        return y

    @abstractmethod
    def _update(self, y: Tensor, x: Tensor, task: int, gates: Tensor) -> Tensor:
        """`y` (rows, ..., D_out) plus one task's update of `x` (rows, ..., D_in); gates are (rows, ..., N)."""
