"""PanGu-Σ: upper layers are random routed, a group of experts a domain (Ren et al., arXiv 2303.10845; design 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import as_tuple, check_choice, check_int, check_real
from ..errors import FormatError
from ..growth.blocks import MoEBlock
from ..growth.ffns import DenseFFN
from ..growth.install import growing_places
from ..routers.random import draw_table
from ..seeds import stable_seed
from ..surgery.plan import Slot
from .growing import GrowingMethod

TABLES = "tables"


@dataclass(frozen=True, kw_only=True)
class PanguSigmaConfig:
    """Settings of `pangu-sigma`.

    Attributes:
        experts_per_group: experts of a domain, in every random-routed layer.
        upper: share of the blocks, the upper ones, whose FFNs become random routed; those below stay dense and shared.
        layers: numbers of the blocks, in place of `upper`.
        table: whether token ids are dealt to the experts of a group uniformly (`uniform`), or so that each gets the same share of the task's
            training tokens (`balanced`).
        source: what a group's experts are copied from: the `dense` FFN, or the group, with its tables, of the most `similar` task.
        noise: on a copy, relative to the deviation of each of its tensors.
        seed: of the tables and the noise; tables of different layers and tasks are drawn independently.
    """

    experts_per_group: int = 4
    upper: float = 0.5
    layers: tuple[int, ...] | None = None
    table: str = "uniform"
    source: str = "dense"
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        as_tuple(self, "layers")
        check_int(self, "experts_per_group", 1)
        check_int(self, "seed", 0)
        check_real(self, "upper", 0.0, 1.0, open_low=True)
        check_real(self, "noise", 0.0, 1e6)
        check_choice(self, "table", ("uniform", "balanced"))
        check_choice(self, "source", ("dense", "similar"))


class PanguSigmaMethod(GrowingMethod):
    """The method `pangu-sigma`. A task is a domain's text: it has a group of its own, so that training it touches no other."""

    name = "pangu-sigma"
    config_class = PanguSigmaConfig
    config: PanguSigmaConfig
    random = True

    def __init__(self, model: nn.Module, config: PanguSigmaConfig) -> None:
        super().__init__(model, config)
        self.reads_similar = config.source == "similar"
        self._groups: dict[int, int] = {}
        self._first: dict[int, dict[str, int]] = {}
        self._frequencies: Tensor | None = None

    @classmethod
    def places(cls, model: nn.Module, config: PanguSigmaConfig) -> Sequence[DenseFFN] | Sequence[MoEBlock]:
        return growing_places(model, mixtures=False, upper=config.upper, layers=config.layers)

    def see_task(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.config.table == "balanced":
            ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
            self._frequencies = torch.bincount(ids, minlength=self._vocab_size)

    def grow(self, task: int, name: str, domain: str | None, similar_to: str | None) -> None:
        config, size = self.config, self.config.experts_per_group
        donor = None if similar_to is None else self.registry.task(similar_to).id
        self._first[task] = {path: layer.num_experts for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            first = layer.num_experts
            if donor is None:
                sources = [0] * size
                seed = stable_seed(config.seed, path, task)
                table = draw_table(self._vocab_size, size, seed, self._frequencies)
            else:
                sources = [self._first[donor][path] + expert for expert in range(size)]
                table = layer.tables[self._groups[donor]].long() - self._first[donor][path]
            layer.grow([Slot((s,), new=True, noise=config.noise) for s in sources], config.seed, task, path)
            self._groups[task] = layer.add_table(table + first)
        self._frequencies = None
        self.context.domain = self._groups[task]

    def end_task(self, name: str) -> None:
        super().end_task(name)
        self.context.domain = -1

    def used_experts(self, task: int, path: str) -> list[int]:
        first = self._first[task][path]
        return list(range(first, first + self.config.experts_per_group))

    def answer_task(self, task: int) -> AbstractContextManager[object]:
        return self.context.use(domain=self._groups[task])

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        """As the others', and `tables` (L, V) int16: the expert of each token id, from the group's first."""
        task = self.registry.task(name).id
        group = self._groups[task]
        tables = [layer.tables[group].cpu() - self._first[task][path] for path, layer in self.layers.items()]
        return super().task_tensors(name) | {TABLES: torch.stack(tables)}

    def remember(self, task: int, tensors: dict[str, Tensor]) -> None:
        if task in self._groups:  # it was trained here
            return
        tables, size = tensors.get(TABLES), self.config.experts_per_group
        shape = (len(self.layers), self._vocab_size)
        if tables is None or tables.shape != shape or not bool(((tables >= 0) & (tables < size)).all()):
            raise FormatError(
                f"task {task} has no tables {shape} of {size} experts; restore its file from a backup",
                code="bad_tensors",
            )
        self._first[task] = {path: layer.num_experts - size for path, layer in self.layers.items()}
        for row, (path, layer) in zip(tables, self.layers.items(), strict=True):
            self._groups[task] = layer.add_table(row + self._first[task][path])

    def table_of(self, task: int, path: str) -> Tensor:
        """(V,) int64 expert of each token id, from the first of a task's group."""
        return self.layers[path].tables[self._groups[task]].long() - self._first[task][path]

    @property
    def _vocab_size(self) -> int:
        return int(next(iter(self.layers.values())).tables.shape[1])
