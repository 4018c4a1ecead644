"""What Lifelong-MoE and PanGu-Σ share: growing layers in a decoder, a ledger of their experts, and the files of a run.

Every task adds experts of its own, which are frozen at its end. The registry has a layer for each growing layer, with the experts of the base
model as its first, which no task owns; a task's mask names the experts that its answers may use, so that what two tasks share is known, and
forgetting one frees what no other uses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import _core
from ..errors import FormatError, ModelError, SurgeryError
from ..growth import values
from ..growth.blocks import MoEBlock
from ..growth.context import GrowthContext, follow_tokens
from ..growth.ffns import DenseFFN
from ..growth.install import install
from ..growth.ledger import without_experts
from ..growth.model import GrownModel, mix_in
from ..models import kind_of
from ..routes import RouterOutput
from ..surgery.plan import Slot
from .base import Method

WEIGHTS, USE, TRUNK = "weights", "use", "trunk."


class GrowingMethod(Method):
    """A method whose tasks add experts to growing layers; a subclass says where these are and which are added.

    Attributes:
        context: shared by the layers.
        layers: by path, in the order of the blocks.
        use: (L, E) int64 tokens that each expert was given in the training of each ended task, by the task's id; E counts the registry's experts,
            gone ones too.
    """

    random: ClassVar[bool]

    def __init__(self, model: nn.Module, config: Any) -> None:
        if isinstance(model, GrownModel):
            raise ModelError("the model has growing layers already; give the base model", code="already_attached")
        places = self.places(model, config)
        self.model, self.config = model, config
        self.registry = _core.Registry()
        self.context = GrowthContext()
        model.requires_grad_(False)
        self.layers = install(
            model,
            places,
            self.context,
            random=self.random,
            top_k=getattr(config, "top_k", 1),
            balance_weight=getattr(config, "balance_weight", 0.0),
            seed=config.seed,
        )
        follow_tokens(model, self.context)
        mix_in(model, self)
        for path, layer in self.layers.items():
            self.registry.add_layer(path, layer.num_experts, values.spaces(layer))
        self.use: dict[int, Tensor] = {}
        self._base = {path: layer.num_experts for path, layer in self.layers.items()}
        self._units = {path: list(range(count)) for path, count in self._base.items()}
        self._load = {path: torch.zeros(count, dtype=torch.int64) for path, count in self._base.items()}
        self._trunk_base = {name: p.detach().cpu().clone() for name, p in self._trunk().items()}

    # -- choices of a subclass -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def places(cls, model: nn.Module, config: Any) -> Sequence[DenseFFN] | Sequence[MoEBlock]:
        """Where the growing layers go."""

    @abstractmethod
    def grow(self, task: int, name: str, domain: str | None, similar_to: str | None) -> None:
        """Add the open task's experts to every layer, and let the context route to them."""

    @abstractmethod
    def used_experts(self, task: int, path: str) -> list[int]:
        """Places in a layer of the added experts that an ended task's answers may use."""

    @abstractmethod
    def answer_task(self, task: int) -> AbstractContextManager[object]:
        """Answer with an ended task's experts."""

    @abstractmethod
    def remember(self, task: int, tensors: dict[str, Tensor]) -> None:
        """Note how the task that has just ended, or was just loaded with `tensors`, is answered."""

    # -- tasks ---------------------------------------------------------------------------------------------------------

    @classmethod
    def check_model(cls, model: nn.Module, config: Any) -> None:
        if kind_of(model.config) != "causal":
            raise ModelError(
                f"{cls.name} grows decoder language models; {type(model).__name__} is none: use another --method",
                code="unknown_architecture",
            )
        cls.places(model, config)

    def begin_task(self, name: str, domain: str | None, num_labels: int | None, similar_to: str | None) -> None:
        task = self.registry.begin_task(name, domain)
        self.grow(task, name, domain, similar_to)
        self._count_free()
        for parameter in self._trunk().values():
            parameter.requires_grad_(True)

    def _count_free(self) -> None:
        """Enter the free experts in the registry."""
        for info in self.registry.layers():
            layer, first = self.layers[info.name], len(info.expert_ids)
            if layer.num_free:
                self.registry.add_experts(info.id, layer.num_free)
                self._units[info.name] += range(first, first + layer.num_free)
            self._load[info.name] = torch.zeros(layer.num_experts, dtype=torch.int64)

    def end_task(self, name: str) -> None:
        task = self.registry.task(name).id
        for layer in self.layers.values():
            layer.freeze()
        for parameter in self._trunk().values():
            parameter.requires_grad_(False)
        self.use[task] = self._use_table()
        self.remember(task, {})
        self.registry.end_task(task, list(self._masks(task)))
        self._set_hashes([task])

    def add_experts(self, name: str, slots: Mapping[str, Sequence[Slot]], seed: int) -> None:
        """Add a task that is not trained: the experts so far and new ones, by a layer's path, answer for it.

        Raises:
            SurgeryError: this method's experts come with their domain (`needs_training`).
        """
        if self.random:
            raise SurgeryError(
                f"{self.name} adds experts by training a domain, which gives them their token ids; use moses train",
                code="needs_training",
            )
        task = self.registry.begin_task(name)
        try:
            for path, added in slots.items():
                self.layers[path].grow(added, seed, task, path)
        except SurgeryError:
            for layer in self.layers.values():
                layer.drop_free()
            self.registry.abandon_task(task)
            raise
        self._count_free()
        self.end_task(name)

    def drop_experts(self, gone: Mapping[str, Sequence[int]]) -> None:
        """Take experts, by a layer's path and their places in it, out of every task.

        Raises:
            SurgeryError: one is the base model's (`base_expert`), or has token ids of a domain (`expert_in_use`).
        """
        for path, places in gone.items():
            layer, base = self.layers[path], self._base[path]
            wrong = [place for place in places if place not in range(layer.num_experts)]
            if wrong:
                raise SurgeryError(
                    f"{path}: has experts 0 to {layer.num_experts - 1}, not {wrong[0]}", code="unknown_expert"
                )
            if any(place < base for place in places):
                raise SurgeryError(
                    f"{path}: experts 0 to {base - 1} are the base model's, which a run does not hold; take out others",
                    code="base_expert",
                )
            if self.random and places:
                raise SurgeryError(
                    f"{path}: expert {places[0]} has token ids of a domain; take the domain out by moses forget",
                    code="expert_in_use",
                )
        numbers = {info.name: info.id for info in self.registry.layers()}
        units = {
            numbers[path]: frozenset(self._units[path][place] for place in places) for path, places in gone.items()
        }
        self.registry = without_experts(self.registry, units)
        for path, places in gone.items():
            left = [place for place in range(self.layers[path].num_experts) if place not in set(places)]
            self.layers[path].keep(left)
            self._units[path] = [self._units[path][place] for place in left]
        self.recount()
        self._set_hashes([info.id for info in self.registry.tasks()])

    def recount(self) -> None:
        """Note again how tasks are answered, after experts have gone."""

    def total_use(self, path: str) -> Tensor:
        """(E,) int64 tokens that each expert of a layer was given in the training of all tasks."""
        row, units = list(self.layers).index(path), self._units[path]
        total = torch.zeros(max(units) + 1, dtype=torch.int64)
        for table in self.use.values():
            width = min(table.shape[1], total.shape[0])
            total[:width] += table[row, :width]
        return total[units]

    def units(self, path: str, experts: Sequence[int]) -> list[int]:
        """Numbers in the registry of these experts of a layer."""
        return [self._units[path][expert] for expert in experts]

    def trained_trunk(self) -> dict[str, Tensor]:
        """The trunk's parameters by name, where they are trained; detached."""
        return {name: parameter.detach() for name, parameter in self._trunk().items()}

    def expert_bytes(self) -> dict[str, int]:
        """Bytes of one expert with its gate row, by its layer's path."""
        return {
            info.name: sum(space.units_per_expert * space.unit_bytes for space in info.spaces)
            for info in self.registry.layers()
        }

    @property
    def base_experts(self) -> dict[str, int]:
        """By a layer's path, the experts that are the base model's."""
        return dict(self._base)

    @contextmanager
    def answer(self, name: str | None) -> Iterator[None]:
        if name is not None:
            with self.answer_task(self.registry.task(name).id):
                yield
            return
        trunk = self._trunk()
        mine = {key: parameter.data for key, parameter in trunk.items()}
        for key, parameter in trunk.items():
            parameter.data = self._trunk_base[key].to(parameter.device)
        try:
            with self.context.use(visible=self._base):
                yield
        finally:
            for key, parameter in trunk.items():
                parameter.data = mine[key]

    # -- losses --------------------------------------------------------------------------------------------------------

    def watch(self) -> AbstractContextManager[Sequence[tuple[str, RouterOutput]]]:
        return self.context.watch()

    def extra_loss(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: Sequence[tuple[str, RouterOutput]]
    ) -> Tensor | None:
        for path, routed in seen:
            load = routed.load.cpu()
            self._load[path][: load.shape[0]] += load
        losses = [routed.loss for _, routed in seen if routed.losses]
        return torch.stack(losses).mean() if losses else None

    # -- files ---------------------------------------------------------------------------------------------------------

    def task_tensors(self, name: str) -> dict[str, Tensor]:
        task = self.registry.task(name).id
        latest = max(info.id for info in self.registry.tasks())
        trunk = {TRUNK + key: p.detach().cpu() for key, p in self._trunk().items()} if task == latest else {}
        return {WEIGHTS: self._owned(task), USE: self.use[task], **trunk}

    def load_task(self, name: str, tensors: dict[str, Tensor]) -> None:
        task = self.registry.task(name).id
        if WEIGHTS not in tensors:
            raise FormatError(f"task {name!r} has no weights; restore its file from a backup", code="bad_tensors")
        start = 0
        for info in self.registry.layers():
            layer = self.layers[info.name]
            units = self._experts_of(info.id, task, owned=True)
            rows, start = values.from_bytes(layer, tensors[WEIGHTS], start, len(units))
            layer.add_frozen(rows)
            self._units[info.name] += units
        if USE in tensors:
            self.use[task] = tensors[USE]
        trunk = self._trunk()
        with torch.no_grad():
            for key, value in tensors.items():
                if key.startswith(TRUNK):
                    trunk[key.removeprefix(TRUNK)].copy_(value)
        self.remember(task, tensors)

    def rewritten(self, name: str) -> list[str]:
        """The task that held the trunk so far, where the trunk is trained."""
        if not self._trunk():
            return []
        return [info.name for info in self.registry.tasks() if info.name != name and info.state == "ended"][-1:]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _trunk(self) -> dict[str, nn.Parameter]:
        """The parameters outside of the growing layers' experts, where they are trained."""
        if not getattr(self.config, "train_trunk", False):
            return {}
        experts = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters(recurse=False)}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in experts}

    def _masks(self, task: int) -> Iterator[tuple[int, str, _core.Mask]]:
        for info in self.registry.layers():
            units = [self._units[info.name][place] for place in self.used_experts(task, info.name)]
            for space in info.spaces if units else ():
                per = space.units_per_expert
                indices = np.concatenate([np.arange(unit * per, (unit + 1) * per) for unit in units])
                yield info.id, space.name, _core.Mask.from_indices(space.length, indices)

    def _experts_of(self, layer: int, task: int, *, owned: bool) -> list[int]:
        """Numbers in the registry of the experts that a task owns, or uses."""
        info = next(info for info in self.registry.layers() if info.id == layer)
        space = info.spaces[0]
        mask = (self.registry.owned if owned else self.registry.mask)(task, layer, space.name)
        units = np.frombuffer(mask.to_indices(), "<u8")
        return [int(unit) // space.units_per_expert for unit in units[:: space.units_per_expert]]

    def _owned(self, task: int) -> Tensor:
        """(bytes,) uint8 of the experts that a task owns, in the registry's order."""
        parts = [torch.zeros(0, dtype=torch.uint8)]
        for info in self.registry.layers():
            place = {unit: place for place, unit in enumerate(self._units[info.name])}
            experts = [place[unit] for unit in self._experts_of(info.id, task, owned=True)]
            parts.append(values.to_bytes(self.layers[info.name], experts))
        return torch.cat(parts)

    def _set_hashes(self, tasks: Sequence[int]) -> None:
        owned: dict[int, Any] = {
            info.id: self._owned(info.id).numpy() for info in self.registry.tasks() if info.state == "ended"
        }
        for task in tasks:
            self.registry.set_content_hash(task, self.registry.content_hash(task, owned))

    def _use_table(self) -> Tensor:
        widest = max(len(info.expert_ids) for info in self.registry.layers())
        table = torch.zeros((len(self.layers), widest), dtype=torch.int64)
        for row, (path, load) in enumerate(self._load.items()):
            table[row, self._units[path]] = load
        return table
