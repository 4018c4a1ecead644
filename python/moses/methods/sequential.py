"""The baseline `sequential`: one LoRA of PEFT trained on and on (TRACE's SeqLoRA, arXiv 2310.06762)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft import PeftModel
from torch import Tensor, nn

from .. import _core
from ..context import Group
from .base import Method
from .peft_adapters import HEAD, PeftAdapters, PeftMethodConfig

ADAPTER = "shared"


class SequentialMethod(Method):
    """Bytes do not grow but for heads; what was learned earlier is written over. The latest task's folder holds the LoRA."""

    name = "sequential"
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
        if isinstance(self.adapters.model, PeftModel):
            self.adapters.activate(ADAPTER, train=True)
        else:
            self.adapters.add(ADAPTER, ADAPTER)
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
        with self.adapters.context.use((Group(task),)):
            self.adapters.set_labels(task)
            yield

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        task = self.registry.task(name).id
        latest = max(info.id for info in self.registry.tasks())
        adapter = self.adapters.tensors(ADAPTER) if task == latest else {}
        return adapter | self.adapters.head_tensors(task)

    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        if any(not key.startswith(HEAD) for key in tensors):
            self.adapters.load_adapter(ADAPTER, ADAPTER, tensors)
        self.adapters.load_head(self.registry.task(name).id, tensors)

    def rewritten(self, name: str) -> list[str]:
        """Earlier tasks whose file changes at the end of `name`: the one that held the LoRA so far."""
        return [info.name for info in self.registry.tasks() if info.name != name and info.state == "ended"][-1:]
