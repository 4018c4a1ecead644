"""What every method is: a few choices around the Trainer's loop, and never a loop of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .. import _core
from ..errors import ConfigError
from ..run_files import task_folder
from ..stream.task import Stream, Task
from ..targets import find_places

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Method(ABC):
    """A method, attached to one model.

    Attributes:
        name: as on the command line.
        config_class: frozen dataclass of its settings.
        config: its settings.
        one_by_one: whether tasks are learned one after the other; what later tasks do to earlier ones is measured only then.
        separable: whether a task can be taken out and leave the others as they are.
        reads_logits: whether `extra_loss` reads the logits of every token, and not those alone that have a label.
        reads_similar: whether `begin_task` makes use of an earlier task that is named as the most similar.
        model: the model that is trained and answers.
        registry: the tasks so far; for `moses` also layers, experts and masks.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Any]]

    config: Any
    one_by_one: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    reads_logits: bool = False
    reads_similar: bool = False
    model: nn.Module
    registry: _core.Registry

    @abstractmethod
    def __init__(self, model: nn.Module, config: Any) -> None:
        """Attach to `model`, in place."""

    @classmethod
    def check_model(cls, model: nn.Module, config: Any) -> None:
        """Raise a `MosesError` where the method cannot be attached to `model`; asked before a run's folder is made."""
        find_places(model, config.target_modules, getattr(config, "ffn_experts", None))

    def trains_on(self, stream: Stream, index: int) -> Sequence[Task]:
        """The tasks of the stream whose examples are learned at place `index`; none for a place where nothing is trained."""
        return (stream.tasks[index],)

    def see_task(self, rows: Sequence[dict[str, Any]]) -> None:
        """Look at the encoded training examples of the task that begins next."""
        return

    @abstractmethod
    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        """Make the parameters of a new task trainable, and the task active."""

    @abstractmethod
    def end_task(self, name: str) -> None:
        """Freeze what the task has learned."""

    @abstractmethod
    def answer(self, name: str | None) -> AbstractContextManager[object]:
        """Answer with the parameters of an ended task (None: as the base model) inside a with block."""

    @abstractmethod
    def task_tensors(self, name: str) -> dict[str, Tensor]:
        """What the run folder holds for an ended task: tensors named `weights`, `router`, `head.*`, or PEFT's own names."""

    @abstractmethod
    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take an ended task back from its tensors; called for all tasks, in the order of their ids."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer during the open task."""
        return []

    def watch(self) -> AbstractContextManager[Any]:
        """What `extra_loss` wants to see of a training forward, as the value of a with block around it."""
        return nullcontext()

    def extra_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: Any) -> Tensor | None:
        """() loss besides the task's own, of one batch; None for none.

        Args:
            model: in training.
            inputs: the batch.
            outputs: of the model.
            seen: what `watch` saw of the forward.
        """
        return None

    # -- fixed capacity: bytes are those of a task's weights, routers and heads; a run with a budget asks for the smallest task first, so
    # that a method without budgets is refused there and never reaches the three after it ------------------------------

    def smallest_task(self) -> int:
        """Bytes of the least that a task adds.

        Raises:
            ConfigError: the method, as it is set, cannot keep to a budget.
        """
        raise ConfigError(
            f"method {self.name!r} keeps to no budget; leave --budget out, or give --method moses or per-task",
            code="no_budget",
        )

    def usual_task(self) -> int:
        """Bytes that the next task adds where nothing limits it."""
        raise NotImplementedError

    def limit_task(self, num_bytes: int) -> None:
        """Let the next task add at most so many bytes (and at least the smallest task's)."""
        raise NotImplementedError

    def give_up(self, num_bytes: int) -> dict[str, float]:
        """Take the least useful weights of ended tasks away until `num_bytes` are free, or nothing is left to take.

        Returns:
            The tasks that lost something, with the share (of the size of their weights) that they lost.
        """
        raise NotImplementedError

    def rewritten(self, name: str) -> list[str]:
        """Earlier tasks whose tensors the end of task `name` changes."""
        return []

    def folder(self, name: str) -> str:
        """The task's folder inside the run."""
        return task_folder(self.registry.task(name))
