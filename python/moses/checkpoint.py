"""Run folders: a model's tasks written in one commit each, and read back to the same bits.

The base model's weights are not in the run; its fingerprint is, and a model of another fingerprint is refused.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors
from torch import Tensor, nn

from . import _core
from .attached import MosesModel
from .config import TrainConfig, from_settings, to_json
from .errors import FormatError, ModelError, RunError
from .growth.folder import is_model_folder, load_folder
from .methods import Method, method_class
from .models import fingerprint, fingerprint_of, kind_of, load_model
from .run_config import ModelSource, RunConfig
from .run_files import CONFIG, REGISTRY, adapter_file, identifier_file, is_run
from .stream.identify import IdentifierConfig, TaskIdentifier
from .targets import hidden_size

SHARED = "trunk."
"""How the names of tensors begin that all tasks of a run share: the latest task's file holds them."""


def load(path: str | PathLike[str], model: nn.Module | str | None = None) -> Any:
    """Load a run, the base model with every ended task of it attached; or the model in a folder that `moses.growth.save_model` wrote.

    Args:
        path: a run folder, or a model's folder of moses's own kind.
        model: the base model, or where to load it from; None takes what the run names.

    Returns:
        The attached model (`MosesModel`), or PEFT's model for the baselines, in evaluation mode and on the CPU.

    Raises:
        ModelError: the base model is not the one that the run was trained on.
        StoreError, FormatError: the folder is no run, or is damaged.
    """
    if is_model_folder(path):
        return load_folder(path)
    with _core.Store.open(path) as store:
        config = read_config(store)
        method, identifier = load_method(store, config, load_base(config, model))
    if isinstance(method.model, MosesModel):
        method.model.identifier = identifier
    return method.model.eval()


def save(model: MosesModel, path: str | PathLike[str]) -> None:
    """Write a run folder with every ended task of an attached model, in one commit; what was there is superseded.

    Raises:
        RunError: the folder is a run of another base model or of other settings.
    """
    config = RunConfig(
        method="moses",
        method_config=to_json(model.moses_config),
        train_config=to_json(TrainConfig()),
        identifier_config={} if model.identifier is None else to_json(model.identifier.config),
        model=model_source(model, getattr(model, "name_or_path", None) or None),
        stream=None,
        formats={},
    )
    method = method_class("moses")(model, model.moses_config)
    store = _core.Store.open(path, write=True) if is_run(path) else _core.Store.create(path)
    with store:
        files = store.files()
        if CONFIG in files:
            old = read_config(store)
            if (old.model.fingerprint, old.method_config) != (config.model.fingerprint, config.method_config):
                raise RunError(
                    f"{path}: is a run of another model or of other settings; save to another folder",
                    code="run_differs",
                )
            config = old
        put = {CONFIG: config.to_bytes(), REGISTRY: model.registry.to_bytes()}
        for info in model.registry.tasks():
            if info.state == "ended":
                put |= task_files(method, model.identifier, info.name)
        store.commit(put, [name for name in files if name.startswith(("tasks/", "identifier/")) and name not in put])


def forget_task(path: str | PathLike[str], name: str) -> dict[str, Any]:
    """Remove a task from a run folder: exactly the weights that no other task uses are freed, every other task keeps its bits.

    Needs the registry and the files alone, not the base model.

    Returns:
        {"task", "bytes_freed"}: bytes of weights that are no longer in the run.

    Raises:
        RunError: the method has one set of weights for all tasks (`not_separable`).
    """
    with _core.Store.open(path, write=True) as store:
        config = read_config(store)
        if not method_class(config.method).separable:
            raise RunError(
                f"{path}: method {config.method!r} has one set of weights for all tasks, and none can be taken out of it; "
                "train again without the task",
                code="not_separable",
            )
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        task = registry.task(name)
        before = {info.id: read_tensors(store, adapter_file(info)) for info in registry.tasks()}
        values = {
            info: tensors["weights"].view(torch.uint8).numpy().tobytes()
            for info, tensors in before.items()
            if "weights" in tensors
        }
        kept = {info.id: info for info in registry.tasks() if info.id != task.id}
        flat = {info: registry.assemble(info, values) for info in kept} if values else {}
        used = {
            (info, layer.id, space.name): registry.mask(info, layer.id, space.name)
            for info in kept
            for layer in registry.layers()
            for space in layer.spaces
        }
        freed = sum(
            mask.count * _unit_bytes(registry, layer, space) for layer, space, mask in registry.forget_task(task.id)
        )
        put = {REGISTRY: registry.to_bytes()}
        for info in kept.values():
            if values and _owned(registry, info.id, used, flat[info.id]) != values[info.id]:
                owned = bytearray(_owned(registry, info.id, used, flat[info.id]))
                weights = torch.frombuffer(owned, dtype=before[info.id]["weights"].dtype)
                put[adapter_file(info)] = write_safetensors(before[info.id] | {"weights": weights})
        shared = {key: value for key, value in before[task.id].items() if key.startswith(SHARED)}
        if shared and kept:  # what all tasks share lies with the latest one
            latest = kept[max(kept)]
            mine = put.get(adapter_file(latest))
            held = before[latest.id] if mine is None else read_safetensors(mine)
            put[adapter_file(latest)] = write_safetensors(held | shared)
        stale = [file for file in (adapter_file(task), identifier_file(task)) if file in store.files()]
        store.commit(put, stale)
        return {"task": name, "bytes_freed": freed, "method": config.method}


def read_config(store: _core.Store) -> RunConfig:
    """The run's config.json."""
    if CONFIG not in store.files():
        raise RunError("the run has no config.json: it was not begun; start it with moses train", code="empty_run")
    return RunConfig.from_bytes(store.read(CONFIG))


def load_base(config: RunConfig, model: nn.Module | str | None) -> nn.Module:
    """The base model that a run names (or `model`), checked against the run's fingerprint.

    Raises:
        ModelError: it cannot be loaded, or is another.
    """
    if model is None or isinstance(model, str):
        source = model or config.model.source
        if source is None:
            raise ModelError(
                "the run's base model was given in memory; pass it to moses.load(path, model)", code="model_needed"
            )
        labels = 2
        model, _, _ = load_model(source, config.model.dtype, num_labels=labels)
    found = fingerprint(model)
    if found != config.model.fingerprint:
        raise ModelError(
            f"the run was trained on another base model: its fingerprint is {config.model.fingerprint[:12]}..., this model's is {found[:12]}...; "
            f"give the model that config.json names ({config.model.source})",
            code="fingerprint_differs",
        )
    return model


def load_method(
    store: _core.Store, config: RunConfig, base: nn.Module, method: Method | None = None
) -> tuple[Method, TaskIdentifier | None]:
    """The run's method attached to `base` (or `method`, attached already) with every ended task loaded, and its task identifier."""
    cls = method_class(config.method)
    method = method or cls(base, from_settings(cls.config_class, config.method_config))
    identifier = (
        TaskIdentifier(from_settings(IdentifierConfig, config.identifier_config), hidden_size(base))
        if config.identifier_config
        else None
    )
    if REGISTRY not in store.files():
        return method, identifier
    registry = _core.Registry.from_bytes(store.read(REGISTRY))
    _require_layers(method.registry, registry)
    adopt_registry(method, registry)
    for info in registry.tasks():
        if info.state != "ended":
            continue
        method.load_task(info.name, read_tensors(store, adapter_file(info)))
        if identifier is not None and identifier_file(info) in store.files():
            identifier.load_task_state(
                info.id, {name: tensor.numpy() for name, tensor in read_tensors(store, identifier_file(info)).items()}
            )
    return method, identifier


def adopt_registry(method: Method, registry: _core.Registry) -> None:
    """Make `registry` the ledger of a method that has no tasks yet."""
    method.registry = registry
    if isinstance(method.model, MosesModel):
        method.model.registry = registry


def task_files(method: Method, identifier: TaskIdentifier | None, name: str) -> dict[str, bytes]:
    """The files that hold an ended task."""
    info = method.registry.task(name)
    files = {
        adapter_file(info): write_safetensors(
            {key: tensor.contiguous() for key, tensor in method.task_tensors(name).items()}
        )
    }
    if identifier is not None and info.id in identifier.task_ids:
        state = {key: torch.from_numpy(array).contiguous() for key, array in identifier.task_state(info.id).items()}
        files[identifier_file(info)] = write_safetensors(state)
    return files


def read_tensors(store: _core.Store, name: str) -> dict[str, Tensor]:
    """A safetensors file of the run, its hash checked by the store."""
    try:
        return read_safetensors(store.read(name))
    except SafetensorError as error:
        raise FormatError(f"{name}: {error}; restore the file from a backup", code="bad_tensors") from None


def model_source(model: nn.Module, source: str | None) -> ModelSource:
    """What a run says of its base model, attached or not."""
    config: Any = model.config
    return ModelSource(
        source=source,
        kind=kind_of(config),
        model_type=str(config.model_type),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        fingerprint=fingerprint_of(model.base_tensors()) if isinstance(model, MosesModel) else fingerprint(model),
    )


def _unit_bytes(registry: _core.Registry, layer: int, space: str) -> int:
    return next(
        part.unit_bytes for info in registry.layers() if info.id == layer for part in info.spaces if part.name == space
    )


def _owned(registry: _core.Registry, task: int, used: dict[tuple[int, int, str], _core.Mask], flat: bytes) -> bytes:
    """The bytes of the values that `task` owns now, cut from all the values that it uses."""
    parts, place = [], 0
    for layer in registry.layers():
        for space in layer.spaces:
            units = memoryview(used[task, layer.id, space.name].to_indices()).cast("Q").tolist()
            owned = set(memoryview(registry.owned(task, layer.id, space.name).to_indices()).cast("Q").tolist())
            size = space.unit_bytes
            parts += [
                flat[place + index * size : place + (index + 1) * size]
                for index, unit in enumerate(units)
                if unit in owned
            ]
            place += len(units) * size
    return b"".join(parts)


def _require_layers(mine: _core.Registry, stored: _core.Registry) -> None:
    ours = [
        (layer.name, [(space.name, space.units_per_expert, space.unit_bytes) for space in layer.spaces])
        for layer in mine.layers()
    ]
    theirs = [
        (layer.name, [(space.name, space.units_per_expert, space.unit_bytes) for space in layer.spaces])
        for layer in stored.layers()
    ]
    if ours != theirs:
        raise FormatError(
            f"{REGISTRY}: its layers are not those of the model and config.json; restore both from one backup",
            code="layers_differ",
        )
