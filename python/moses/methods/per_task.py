"""The baseline `per-task`: an adapter of PEFT a task (LoRA, arXiv 2106.09685; VeRA, 2310.11454; IA3, 2205.05638)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftModel
from torch import Tensor, nn

from .. import _core
from ..context import Group
from .base import Method
from .peft_adapters import PeftAdapters, PeftMethodConfig


class PerTaskMethod(Method):
    """Nothing is shared and nothing is forgotten; bytes grow by a whole adapter a task."""

    name = "per-task"
    config_class = PeftMethodConfig

    def __init__(self, model: nn.Module, config: PeftMethodConfig) -> None:
        self.config = config
        self.registry = _core.Registry()
        self.adapters = PeftAdapters(model, config)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self.adapters.model

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        task = self.registry.begin_task(name, domain)
        self.adapters.add(adapter_name(task), f"task {task}")
        self.adapters.open_head(task, num_labels)

    def end_task(self, name: str) -> None:
        task = self.registry.task(name).id
        self.registry.end_task(task, [])
        self.adapters.close_head(task)
        self.adapters.freeze()

    def answer(self, name: str | None) -> AbstractContextManager[object]:
        model = self.adapters.model
        if name is None:
            return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        return self._answer(self.registry.task(name).id)

    @contextmanager
    def _answer(self, task: int) -> Iterator[None]:
        self.adapters.activate(adapter_name(task), train=False)
        with self.adapters.context.use((Group(task),)):
            self.adapters.set_labels(task)
            yield

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        task = self.registry.task(name).id
        return self.adapters.tensors(adapter_name(task)) | self.adapters.head_tensors(task)

    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        task = self.registry.task(name).id
        self.adapters.load_adapter(adapter_name(task), f"task {task}", tensors)
        self.adapters.load_head(task, tensors)


def adapter_name(task: int) -> str:
    """PEFT's adapter names must not hold dots, which tasks' names may."""
    return f"task_{task}"
