"""The baseline `sequential`: one LoRA of PEFT trained on and on (TRACE's SeqLoRA, arXiv 2310.06762)."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor

from .peft_adapters import HEAD
from .peft_method import PeftMethod

ADAPTER = "shared"


class SequentialMethod(PeftMethod):
    """Bytes do not grow but for heads; what was learned earlier is written over. The latest task's folder holds the LoRA."""

    name = "sequential"
    separable = False

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        task = self.registry.begin_task(name, domain)
        if isinstance(self.adapters.model, PeftModel):
            self.adapters.activate(ADAPTER, train=True)
        else:
            self.adapters.add(ADAPTER, ADAPTER)
        self.adapters.open_head(task, num_labels)

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
