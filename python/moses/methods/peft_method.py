"""What the baselines on PEFT share: a registry of tasks without layers, adapters of PEFT, and a head a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftModel
from torch import nn

from .. import _core
from ..context import Group
from .base import Method
from .peft_adapters import PeftAdapters, PeftMethodConfig


class PeftMethod(Method):
    """A method whose tasks are answered by adapters of PEFT; a subclass says which adapter a task has."""

    config_class = PeftMethodConfig

    def __init__(self, model: nn.Module, config: PeftMethodConfig) -> None:
        self.config = config
        self.registry = _core.Registry()
        self.adapters = PeftAdapters(model, config)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self.adapters.model

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

    def use_adapter(self, task: int) -> None:
        """Make the adapter of an ended task the active one; nothing to do where all tasks share one."""

    @contextmanager
    def _answer(self, task: int) -> Iterator[None]:
        self.use_adapter(task)
        with self.adapters.context.use((Group(task),)):
            self.adapters.set_labels(task)
            yield
