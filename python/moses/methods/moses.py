"""MoSEs: banks of low-rank experts, a masked part of them a task (Kang, arXiv 2511.06237; design 3.1)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..attached import MosesModel
from ..attachment import attach
from ..config import MosesConfig
from ..errors import ConfigError
from ..giving_up import give_up_components
from .base import Method

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class MosesMethod(Method):
    """The method `moses`."""

    name = "moses"
    config_class = MosesConfig
    model: MosesModel

    def __init__(self, model: nn.Module, config: MosesConfig) -> None:
        self.config = config
        self.model = model if isinstance(model, MosesModel) else attach(model, config)
        self.registry = self.model.registry
        self.reads_similar = config.reuse == "similar"

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        self.model.begin_task(name, domain=domain, num_labels=num_labels, similar_to=similar_to)

    def callbacks(self) -> list[TrainerCallback]:
        return [CutCallback(self.model)]

    def end_task(self, name: str) -> None:
        self.model.end_task(name)

    def answer(self, name: str | None) -> AbstractContextManager[object]:
        return self.model.base() if name is None else self.model.task(name)

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        return self.model.task_tensors(self.registry.task(name).id)

    def smallest_task(self) -> int:
        if self.config.granularity != "rank":
            raise ConfigError(
                f"granularity {self.config.granularity!r} keeps to no budget: single weights save no bytes; use rank",
                code="no_budget",
            )
        component = max(space.unit_bytes for layer in self.registry.layers() for space in layer.spaces)
        return self._router_bytes() + component

    def usual_task(self) -> int:
        limit, self.model.new_limit = self.model.new_limit, None
        usual = self._router_bytes() + self.model.new_budget
        self.model.new_limit = limit
        return usual

    def limit_task(self, num_bytes: int) -> None:
        self.model.new_limit = max(0, num_bytes - self._router_bytes())

    def give_up(self, num_bytes: int) -> dict[str, float]:
        return give_up_components(self.model, num_bytes)

    def _router_bytes(self) -> int:
        return sum(4 * router.num_experts * router.width for router in self.model._routers().values())

    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.model.load_task_tensors(self.registry.task(name).id, tensors)


class CutCallback(TrainerCallback):
    """Cuts the open task's candidates to its budget after `warmup` of the optimizer's steps."""

    def __init__(self, model: MosesModel) -> None:
        self.model = model

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Of the Trainer."""
        if state.global_step >= math.ceil(self.model.moses_config.warmup * state.max_steps):
            with torch.no_grad():
                self.model.cut_task()
