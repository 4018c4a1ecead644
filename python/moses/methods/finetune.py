"""The baselines `finetune` and `joint`: every weight of the model is trained, one set of weights answers all tasks.

`finetune` learns task after task, with KL to the model before the task where asked (the distillation of Li and Hoiem, Learning without
Forgetting, arXiv 1606.09282, on the current data). `joint` learns all tasks at once, mixed: the upper bound of continual learning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core
from ..config import check_real
from ..errors import FormatError, ModelError
from ..growth.layer import MixtureFFN, route
from ..loss import distillation_loss
from ..models import kind_of
from ..routers import RandomRouter
from ..routes import RouterOutput
from ..stream.task import Stream, Task
from .base import Method


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Joint training has no settings of its own."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of full fine-tuning.

    Attributes:
        kl: λ, weight of KL(old ‖ new) on the current data, old being the model before the task; 0 is without.
    """

    kl: float = 0.0

    def __post_init__(self) -> None:
        check_real(self, "kl", 0.0, 1e6)


class Routing:
    """Routes every forward of a model with moses's own mixtures, and keeps what their routers said of the last one in training.

    Attributes:
        outputs: by the mixture's block.
    """

    def __init__(self, model: nn.Module) -> None:
        mixtures = [module for module in model.modules() if isinstance(module, MixtureFFN)]
        self.by_token = any(isinstance(mixture.router, RandomRouter) for mixture in mixtures)
        self.outputs: dict[str, RouterOutput] = {}
        self._open: list[ExitStack] = []
        if mixtures:
            # of the decoder, which also runs without its head; partials, not closures: a deep copy of the model has hooks of its own
            decoder: Any = getattr(model, "base_model", model)
            decoder.register_forward_pre_hook(partial(_enter, self), with_kwargs=True)
            decoder.register_forward_hook(partial(_leave, self), always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        copied = copy.copy(self)
        copied.outputs, copied._open = {}, []
        return copied

    @property
    def loss(self) -> Tensor | None:
        """() sum of the routers' own losses; None where there is no mixture."""
        losses = [output.loss for output in self.outputs.values() if output.loss is not None]
        return torch.stack([loss.float() for loss in losses]).sum() if losses else None


def _enter(routing: Routing, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    stack = ExitStack()
    routing.outputs = stack.enter_context(route(**({"token_ids": ids, "domains": 0} if routing.by_token else {})))
    routing._open.append(stack)


def _leave(routing: Routing, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    routing._open.pop().close()


class WholeModelMethod(Method):
    """Trains every weight in place. The base model's weights are kept, on the CPU, since what infers tasks reads its features."""

    separable = False

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self.registry = _core.Registry()
        self._teacher: nn.Module | None = None
        self.reads_logits = bool(getattr(config, "kl", 0.0))
        self._routing = Routing(model)
        model.requires_grad_(False)
        self._base = {name: tensor.detach().cpu().clone() for name, tensor in self._weights().items()}

    @classmethod
    def check_model(cls, model: nn.Module, config: Any) -> None:
        """A classifier is refused: it would need a head a task."""
        if kind_of(model.config) == "classifier":
            raise ModelError(
                f"method {cls.name!r} is for language models, and the model is a classifier: use sequential or per-task",
                code="not_a_language_model",
            )

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        self.registry.begin_task(name, domain)
        if getattr(self.config, "kl", 0.0):
            self._teacher = copy.deepcopy(self.model).eval()
        self.model.requires_grad_(True)

    def end_task(self, name: str) -> None:
        self.registry.end_task(self.registry.task(name).id, [])
        self.model.requires_grad_(False)
        self._teacher = None

    @contextmanager
    def answer(self, name: str | None) -> Iterator[None]:
        """All tasks are answered by the weights as they are now, the base model by its own."""
        if name is not None:
            self.registry.task(name)  # an unknown name is an error
            yield
            return
        weights = self._weights()
        trained = {key: tensor.data for key, tensor in weights.items()}
        for key, tensor in weights.items():
            tensor.data = self._base[key].to(tensor.device)
        try:
            yield
        finally:
            for key, tensor in weights.items():
                tensor.data = trained[key]

    def extra_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: Any) -> Tensor | None:
        """The routers' own losses, and λ times the mean of KL(old ‖ new) over the tokens that have a label."""
        balance = self._routing.loss
        if self._teacher is None:
            return balance
        labels = inputs["labels"]
        with torch.no_grad():
            old = self._teacher(**{key: value for key, value in inputs.items() if key != "num_items_in_batch"}).logits
        new = outputs.logits
        if kind_of(self.model.config) == "causal":  # logits of a decoder are for the token after theirs
            old, new, labels = old[:, :-1], new[:, :-1], labels[:, 1:]
        learned = labels >= 0
        kl: float = self.config.kl
        drift = kl * distillation_loss(old[learned], new[learned])
        return drift if balance is None else drift + balance

    def rewritten(self, name: str) -> list[str]:
        """The task that held the weights so far."""
        return [info.name for info in self.registry.tasks() if info.name != name and info.state == "ended"][-1:]

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        task = self.registry.task(name).id
        if task != max(info.id for info in self.registry.tasks()):
            return {}
        return {key: tensor.detach().cpu() for key, tensor in self._weights().items()}

    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        weights = self._weights()
        for key in sorted(weights.keys() ^ tensors.keys()):
            raise FormatError(f"task {name}: tensor {key!r} is not in both the run and the model", code="bad_tensors")
        for key, tensor in weights.items():
            if (tensor.shape, tensor.dtype) != (tensors[key].shape, tensors[key].dtype):
                raise FormatError(
                    f"task {name}: tensor {key!r} has {tuple(tensors[key].shape)} {tensors[key].dtype}, "
                    f"the model's {tuple(tensor.shape)} {tensor.dtype}",
                    code="bad_tensors",
                )
            tensor.data.copy_(tensors[key])

    def _weights(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


class FinetuneMethod(WholeModelMethod):
    """Sequential full fine-tuning: what was learned earlier is written over."""

    name = "finetune"
    config_class = FinetuneConfig


class JointMethod(WholeModelMethod):
    """All tasks are learned at the first one's place, from their examples mixed; nothing is trained at the others'."""

    name = "joint"
    one_by_one = False
    config_class = JointConfig

    def trains_on(self, stream: Stream, index: int) -> Sequence[Task]:
        """All tasks, at once."""
        return stream.tasks if index == 0 else ()
