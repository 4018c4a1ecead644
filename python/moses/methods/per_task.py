"""The baseline `per-task`: an adapter of PEFT a task (LoRA, arXiv 2106.09685; VeRA, 2310.11454; IA3, 2205.05638)."""

from __future__ import annotations

from torch import Tensor

from .peft_method import PeftMethod


class PerTaskMethod(PeftMethod):
    """Nothing is shared and nothing is forgotten; bytes grow by a whole adapter a task."""

    name = "per-task"

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        task = self.registry.begin_task(name, domain)
        self.adapters.add(adapter_name(task), f"task {task}")
        self.adapters.open_head(task, num_labels)

    def use_adapter(self, task: int) -> None:
        self.adapters.activate(adapter_name(task), train=False)

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
