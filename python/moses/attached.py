"""The face of a model with sub-experts: begin and end tasks, choose the task to answer for, save.

`MosesModel` is mixed into the model's own class, so that `generate`, the Trainer and `isinstance` go on working. It keeps
no ledger of its own: who uses which weight is asked of the registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _core
from .config import MosesConfig
from .context import Group, TaskContext, groups_by_task
from .errors import FormatError, RegistryError
from .heads import TaskHead
from .routers import TaskRouter
from .seeds import stable_seed
from .selection import bank_bytes, select_candidates
from .subexperts import Bank, SubExpertLayer

if TYPE_CHECKING:
    from .stream.identify import Identification, TaskIdentifier


class MosesModel(nn.Module):
    """Mixed into the class of an attached model. Make one by `moses.attach`."""

    # transformers evaluates the annotations of its model classes, so these must be importable at run time.
    moses_config: MosesConfig
    registry: _core.Registry
    identifier: Any  # TaskIdentifier | None
    _context: TaskContext
    _bank_modules: dict[str, SubExpertLayer]
    _router_modules: dict[str, TaskRouter]
    _head: TaskHead | None
    _was_cut: bool
    new_limit: int | None

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def begin_task(
        self, name: str, *, domain: str | None = None, num_labels: int | None = None, similar_to: str | None = None
    ) -> int:
        """Open a task: its candidates become parameters, and plain forward and backward train them.

        Args:
            name: unique among live tasks.
            domain: kept in the registry.
            num_labels: labels of the task's head, for a model with a head a task.
            similar_to: the ended task whose sub-experts and routers this one starts from (`reuse="similar"`); None starts afresh.

        Returns:
            The task's id.

        Raises:
            RegistryError: the name is taken, another task is open, or `similar_to` is unknown.
            ConfigError: a head is needed and `num_labels` is missing.
        """
        config, registry, context = self.moses_config, self.registry, self._context
        donor = None if similar_to is None else registry.task(similar_to).id
        if self._head is not None and (num_labels is None or num_labels < 2):
            raise RegistryError(
                f"task {name!r} needs num_labels of at least 2: the model has a head a task", code="missing_labels"
            )
        self._grow_when_full()
        task = registry.begin_task(name, domain)
        for layer, bank in self._layers():
            generator = torch.Generator().manual_seed(stable_seed(config.seed, task, layer.name))
            fresh = {space.name: registry.free(layer.id, space.name) for space in layer.spaces}
            reused = {space.name: self._reused(layer.id, space.name, donor) for space in layer.spaces}
            bank.open(task, fresh, reused, generator)
        for router in self._routers().values():
            router.open(task, donor if config.reuse == "similar" else None)
        if self._head is not None:
            assert num_labels is not None
            self._head.open(task, num_labels, torch.Generator().manual_seed(stable_seed(config.seed, task, "head")))
        context.open_task = task
        self._was_cut = False
        self._activate(task)
        if config.granularity == "element":
            self._select()
        return task

    def cut_task(self) -> None:
        """Cut the open task's candidates to its budget of bytes; training goes on with what is kept.

        Called by `moses.train` after `warmup` of the steps. `end_task` does it where you did not, at a cost in accuracy.
        """
        self._open_task()
        if self._was_cut:
            return
        self._select()
        for _, bank in self._layers():
            bank.hold()
        self._was_cut = True

    def end_task(self, name: str) -> None:
        """Freeze the open task: newly used weights go to the buffers, masks to the registry."""
        task = self._open_task()
        if self.registry.task(name).id != task:
            raise RegistryError(
                f"task {name!r} is not the open one ({self._name(task)!r}); end that first", code="task_not_open"
            )
        self.cut_task()
        masks = [(layer.id, space, mask) for layer, bank in self._layers() for space, mask in bank.close().items()]
        self.registry.end_task(task, masks)
        for router in self._routers().values():
            router.close(task)
        if self._head is not None:
            self._head.close(task)
        self._context.open_task = None
        self.read_task(task)
        self.registry.set_content_hash(task, self.registry.content_hash(task, self.owned_values()))

    def abandon_task(self) -> None:
        """Give up the open task; nothing of it stays but its id, which is not used again."""
        task = self._open_task()
        for _, bank in self._layers():
            bank.drop()
        for router in self._routers().values():
            router.close(None)
        if self._head is not None:
            self._head.drop(task)
        self._context.open_task, self._context.groups = None, ()
        self.registry.abandon_task(task)

    def forget_task(self, name: str) -> int:
        """Remove a task, and free exactly the weights that no other task uses.

        Returns:
            Bytes freed in the bank.
        """
        task = self.registry.task(name).id
        if task == self._context.open_task:
            self.abandon_task()
            return 0
        by_id = {layer.id: (layer, bank) for layer, bank in self._layers()}
        freed = 0
        for layer_id, space, mask in self.registry.forget_task(task):
            layer, bank = by_id[layer_id]
            size = next(part.unit_bytes for part in layer.spaces if part.name == space)
            bank.load_values(space, mask, torch.zeros(mask.count * size // bank.dtype.itemsize))
            freed += mask.count * size
        for _, bank in self._layers():
            bank.forget(task)
        for router in self._routers().values():
            router.forget(task)
        if self._head is not None:
            self._head.forget(task)
        if self.identifier is not None and task in self.identifier.task_ids:
            self.identifier.remove_task(task)
        self._context.groups = ()
        return freed

    @contextmanager
    def task(self, name: str | None) -> Iterator[MosesModel]:
        """Answer for task `name` inside the with block; None infers the task of each prompt (TaIL)."""
        if name is None:
            self._need_identifier()
            with self._context.use((), infer=True):
                yield self
            return
        with self._context.use((Group(self.registry.task(name).id),)):
            self._set_labels()
            yield self
        self._set_labels()

    @contextmanager
    def base(self) -> Iterator[MosesModel]:
        """Answer as the model did before any task, inside the with block."""
        with self._context.use(()):
            yield self

    @contextmanager
    def tasks_of_rows(self, task_ids: Tensor) -> Iterator[MosesModel]:
        """Answer row i of each batch for task `task_ids[i]` (-1: the base model), inside the with block."""
        with self._context.use(groups_by_task(task_ids)):
            self._set_labels()
            yield self

    def identify(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Identification:
        """Infer the task of each prompt: (batch, tokens) ids and mask, padded on either side."""
        identifier = self._need_identifier()
        return identifier.predict(self.prompt_features(input_ids, attention_mask))

    @torch.no_grad()
    def prompt_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, 2, D) float32 features of the frozen base model that the task identifier reads."""
        from .stream.identify import prompt_features

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        training = self.training
        self.eval()
        try:
            with self.base():
                return prompt_features(self, input_ids, attention_mask, self._need_identifier().config.layer)
        finally:
            self.train(training)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; under `model.task(None)` each prompt is answered for the task inferred from it."""
        if not self._context.infer:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        prompts = inputs if inputs is not None else kwargs["input_ids"]
        found = self.identify(prompts, kwargs.get("attention_mask"))
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        with self.tasks_of_rows(assigned(found).repeat_interleave(copies)):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a run folder with every ended task, the registry and the base model's fingerprint. Atomic."""
        from .checkpoint import save

        save(self, path)

    @contextmanager
    def counting_experts(self) -> Iterator[dict[tuple[int, str], Tensor]]:
        """Count tokens per expert, (N,) int64 by (task's id, router's name), over the forwards inside the with block."""
        counts: dict[tuple[int, str], Tensor] = {}
        self._context.counts = counts
        try:
            yield counts
        finally:
            self._context.counts = None

    # -- figures -------------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, as PEFT counts them."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    @property
    def bank_bytes(self) -> int:
        """Bytes that the banks as they were first made can hold; budgets are shares of it, also after growth."""
        config = self.moses_config
        return sum(bank_bytes(bank) * config.num_experts // bank.num_experts for _, bank in self._layers())

    @property
    def new_budget(self) -> int:
        """Bytes that the open task may newly use; `new_limit` bounds it, where that is set."""
        first = int(self.moses_config.density * self.bank_bytes)
        ended = any(task.state == "ended" for task in self.registry.tasks())
        usual = int(first * self.moses_config.growth) if ended else first
        return usual if self.new_limit is None else min(usual, self.new_limit)

    def owned_values(self) -> dict[int, bytes]:
        """For every ended task, the bytes of the values that it owns, in the registry's order."""
        return {
            task.id: self.task_values(task.id).view(torch.uint8).numpy().tobytes()
            for task in self.registry.tasks()
            if task.state == "ended"
        }

    def task_values(self, task: int) -> Tensor:
        """(values,) of the config's `weight_dtype` that `task` owns (is the first live task to use)."""
        parts = [
            bank.values(space.name, self.registry.owned(task, layer.id, space.name))
            for layer, bank in self._layers()
            for space in layer.spaces
        ]
        return torch.cat(parts)

    def task_tensors(self, task: int) -> dict[str, Tensor]:
        """What a run folder holds of an ended task: `weights` (the values it owns), `router` (all its routers'), `head.*`, on the CPU."""
        tensors = {"weights": self.task_values(task), "router": self._router_values(task)}
        if self._head is not None:
            weight, bias = self._head.parts(task)
            tensors |= {"head.weight": weight.detach().cpu(), "head.bias": bias.detach().cpu()}
        return tensors

    def load_task_tensors(self, task: int, tensors: dict[str, Tensor]) -> None:
        """Take back what `task_tensors` gave; the registry must hold the task's masks already.

        Raises:
            FormatError: the sizes do not fit the registry's masks and the model's routers.
        """
        for layer, bank in self._layers():
            if len(layer.expert_ids) > bank.num_experts:
                bank.grow(len(layer.expert_ids) - bank.num_experts)
        values = tensors["weights"]
        place = 0
        for layer, bank in self._layers():
            for space in layer.spaces:
                mask = self.registry.owned(task, layer.id, space.name)
                size = mask.count * space.unit_bytes // values.element_size()
                _require_room(values, place + size, "weights", task)
                bank.load_values(space.name, mask, values[place : place + size])
                place += size
        _require_end(values, place, "weights", task)
        self._load_routers(task, tensors["router"])
        if self._head is not None:
            self._head.load(task, tensors["head.weight"], tensors["head.bias"])
        self.read_task(task)

    def _router_values(self, task: int) -> Tensor:
        parts = [router.task_weight(task).detach().flatten().cpu() for router in self._routers().values()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _load_routers(self, task: int, values: Tensor) -> None:
        width = sum(router.width for router in self._routers().values())
        experts = len(values) // width if width else 0
        _require_end(values, experts * width, "router", task)
        place = 0
        for router in self._routers().values():
            if experts > router.num_experts:
                router.grow(experts)
            size = experts * router.width
            router.load(task, values[place : place + size].reshape(experts, router.width))
            place += size

    def set_labels(self, num_labels: int) -> None:
        """Tell a sequence classifier how wide its logits are, for it reshapes them when it computes the loss."""
        self.num_labels = self.config.num_labels = num_labels  # type: ignore[union-attr]

    def base_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the base model by the names they had before `attach`; not copies."""
        persistent = self.state_dict(keep_vars=True)
        every = dict(self.named_parameters()) | {name: t for name, t in self.named_buffers() if name in persistent}
        added = [f"{path}.{part}." for path in self._banks() for part in ("bank", "router")]
        tensors = {}
        for name, tensor in every.items():
            if not any(name.startswith(prefix) for prefix in added):
                tensors[name.replace(".base_layer.", ".")] = tensor
        if self._head is not None:
            path, (original,) = self._head.replaced
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(path + ".")}
            tensors |= {f"{path}.{name}": tensor for name, tensor in original.named_parameters()}
        return tensors

    def read_task(self, task: int) -> None:
        """Read a task's masks from the registry, so that switching to it is one assignment."""
        num_experts = min(router.slots[task][1] for router in self._routers().values())
        for layer, bank in self._layers():
            masks = {space.name: self.registry.mask(task, layer.id, space.name) for space in layer.spaces}
            bank.read(task, masks, num_experts)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[tuple[_core.LayerInfo, Bank]]:
        banks = self._banks()
        return ((layer, banks[layer.name].bank) for layer in self.registry.layers())

    def _banks(self) -> dict[str, SubExpertLayer]:
        return self._bank_modules

    def _routers(self) -> dict[str, TaskRouter]:
        return self._router_modules

    def _reused(self, layer: int, space: str, donor: int | None) -> _core.Mask:
        if self.moses_config.reuse == "all":
            return self.registry.used(layer, space)
        if self.moses_config.reuse == "similar" and donor is not None:
            return self.registry.mask(donor, layer, space)
        return _core.Mask.empty(self.registry.used(layer, space).length)

    def _grow_when_full(self) -> None:
        # Where a layer has less than one expert left, every layer gets one more: a block's router serves banks of one size.
        layers = list(self._layers())
        full = any(
            self.registry.free(layer.id, space.name).count < space.units_per_expert
            for layer, _ in layers
            for space in layer.spaces
        )
        if not full:
            return
        for layer, bank in layers:
            self.registry.add_experts(layer.id, 1)
            bank.grow(1)
        for router in self._routers().values():
            router.grow(router.num_experts + 1)

    def _select(self) -> None:
        # A task's mask is at most `density` of the bank: what it newly uses, and frozen units for the rest.
        first = int(self.moses_config.density * self.bank_bytes)
        banks = [bank for _, bank in self._layers()]
        select_candidates(banks, self.new_budget, first - self.new_budget, self.moses_config.budget == "tensor")

    def _activate(self, task: int) -> None:
        self._context.groups, self._context.infer = (Group(task),), False
        self._set_labels()

    def _set_labels(self) -> None:
        if self._head is not None and self._context.groups:
            self.set_labels(max(self._head.labels[group.task] for group in self._context.groups))

    def _open_task(self) -> int:
        if self._context.open_task is None:
            raise RegistryError("no task is open; call begin_task first", code="task_not_open")
        return self._context.open_task

    def _need_identifier(self) -> TaskIdentifier:
        if self.identifier is None:
            raise RegistryError(
                "the model has no task identifier, so a task must be given; moses.train makes one", code="no_identifier"
            )
        identifier: TaskIdentifier = self.identifier
        return identifier

    def _name(self, task: int) -> str:
        return next(info.name for info in self.registry.tasks() if info.id == task)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        return _rebuild, (base,), self.__dict__


def mix_in(
    model: nn.Module,
    config: MosesConfig,
    context: TaskContext,
    registry: _core.Registry,
    banks: dict[str, SubExpertLayer],
    routers: dict[str, TaskRouter],
    head: TaskHead | None,
) -> MosesModel:
    """Give `model` the face of `MosesModel`, in place."""
    model.__class__ = _class_of(type(model))
    # Set past nn.Module's own bookkeeping: these modules are already children elsewhere in the tree.
    model.__dict__.update(
        moses_config=config,
        registry=registry,
        identifier=None,
        _context=context,
        _bank_modules=banks,
        _router_modules=routers,
        _head=head,
        _was_cut=False,
        new_limit=None,
    )
    model.__dict__["_moses_hook"] = model.register_forward_pre_hook(before_model, with_kwargs=True)
    assert isinstance(model, MosesModel)
    return model


def take_out(model: MosesModel) -> nn.Module:
    """Undo `mix_in`."""
    model._moses_hook.remove()  # type: ignore[operator, union-attr]
    for name in (
        "moses_config",
        "registry",
        "identifier",
        "_context",
        "_bank_modules",
        "_router_modules",
        "_head",
        "_was_cut",
        "new_limit",
        "_moses_hook",
    ):
        model.__dict__.pop(name)
    model.__class__ = type(model).__mro__[2]
    return model


def before_model(model: MosesModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the whole model: select element masks in training, infer tasks of a batch in TaIL."""
    context = model._context
    if (
        context.open_task is not None
        and model.training
        and not model._was_cut
        and model.moses_config.granularity == "element"
    ):
        model._select()
    if context.infer and not (context.groups and _is_continuation(kwargs)):
        prompts = args[0] if args else kwargs["input_ids"]
        context.groups = groups_by_task(assigned(model.identify(prompts, kwargs.get("attention_mask"))))
        model._set_labels()


def assigned(found: Identification) -> Tensor:
    """(batch,) int64 task ids, -1 where the task is unknown."""
    return torch.from_numpy(found.task_ids).masked_fill(torch.from_numpy(found.unknown), -1)


def _is_continuation(kwargs: dict[str, Any]) -> bool:
    cache = kwargs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def _require_room(values: Tensor, needed: int, what: str, task: int) -> None:
    if len(values) < needed:
        raise FormatError(
            f"{what} of task {task} hold {len(values)} values, the registry's masks need {needed} or more",
            code="values_do_not_fit",
        )


def _require_end(values: Tensor, needed: int, what: str, task: int) -> None:
    if len(values) != needed:
        raise FormatError(
            f"{what} of task {task} hold {len(values)} values, {needed} were expected", code="values_do_not_fit"
        )


_CLASSES: dict[type, type] = {}


def _class_of(base: type) -> type:
    if base not in _CLASSES:
        # The same name, for transformers looks model classes up by it.
        _CLASSES[base] = type(
            base.__name__, (MosesModel, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
        )
    return _CLASSES[base]


def _rebuild(base: type) -> nn.Module:
    cls = _class_of(base)
    model: nn.Module = object.__new__(cls)
    return model
