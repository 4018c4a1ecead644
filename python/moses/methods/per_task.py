"""The baseline `per-task`: an adapter of PEFT a task (LoRA, arXiv 2106.09685; VeRA, 2310.11454; IA3, 2205.05638)."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from .lora_rank import energies, truncated
from .peft_method import PeftMethod


class PerTaskMethod(PeftMethod):
    """Nothing is shared and nothing is forgotten; bytes grow by a whole adapter a task."""

    name = "per-task"
    _rank: int | None = None  # of the next task; None is the config's

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        task = self.registry.begin_task(name, domain)
        self.adapters.add(adapter_name(task), f"task {task}", self._rank)
        self.adapters.open_head(task, num_labels)

    # -- fixed capacity ------------------------------------------------------------------------------------------------

    def smallest_task(self) -> int:
        if self.config.adapter != "lora":
            raise ConfigError(
                f"adapter {self.config.adapter!r} has no rank to lower, and keeps to no budget; use lora",
                code="no_budget",
            )
        return self.adapters.bytes_per_rank

    def usual_task(self) -> int:
        return int(self.config.rank) * self.adapters.bytes_per_rank

    def limit_task(self, num_bytes: int) -> None:
        self._rank = max(1, min(self.config.rank, num_bytes // self.adapters.bytes_per_rank))

    def give_up(self, num_bytes: int) -> dict[str, float]:
        """The rule: again and again, the adapter that loses the smallest share of its energy (squared singular values) goes down by
        a rank; the older one at a tie."""
        adapters = {info.id: self.adapters.tensors(adapter_name(info.id)) for info in self.registry.tasks()}
        found = {task: energies(tensors) for task, tensors in adapters.items()}
        ranks = {task: len(energy) for task, energy in found.items()}
        freed = 0
        while freed < num_bytes:
            costs = {
                task: float(found[task][rank - 1 :].sum() / found[task].sum().clamp_min(1e-30))
                for task, rank in ranks.items()
                if rank > 1
            }
            if not costs:
                break
            ranks[min(costs, key=lambda task: (costs[task], task))] -= 1
            freed += self.adapters.bytes_per_rank
        names = {info.id: info.name for info in self.registry.tasks()}
        lost = {}
        for task, rank in ranks.items():
            if rank < len(found[task]):
                self.adapters.replace(adapter_name(task), f"task {task}", truncated(adapters[task], rank))
                lost[names[task]] = float(found[task][rank:].sum() / found[task].sum().clamp_min(1e-30))
        return lost

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
