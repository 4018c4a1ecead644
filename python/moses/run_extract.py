"""Takes one domain's model out of a run of growing experts: `moses extract RUN --domain D`."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _core
from .checkpoint import load_base, load_method, read_config
from .errors import RunError, SurgeryError
from .growth.apply import apply
from .growth.blocks import moe_blocks, parameter
from .growth.ffns import dense_ffns
from .growth.folder import require_free, save_model
from .growth.growing import GrowingLayer
from .growth.install import growing_places
from .growth.layer import MixtureFFN
from .growth.live import perplexity
from .growth.slots import slot_rows
from .growth.upcycle import upcycle
from .methods.growing import GrowingMethod
from .methods.lifelong_moe import LifelongMoEMethod
from .methods.pangu_sigma import PanguSigmaMethod
from .models import load_model
from .routers import RandomRouter
from .run_files import REGISTRY
from .run_surgery import batches_of, require_growing
from .session import open_session
from .stream import Stream
from .surgery.plan import LayerSurgery, Slot, SurgeryPlan


def extract_run(
    path: str | PathLike[str],
    domain: str,
    out: str | PathLike[str],
    *,
    merge_group: bool = False,
    model: nn.Module | str | None = None,
    stream: Stream | str | None = None,
) -> dict[str, Any]:
    """Write the model of one domain, or task, alone: without the experts that it does not use.

    A group of one expert becomes a plain dense model; so does a larger one with `merge_group`, by averaging, with what that costs in perplexity.
    A larger group without, which no class of transformers routes by token id, and mixtures that no class holds, become moses's own folder.

    Args:
        path: the run.
        domain: a domain, whose latest task is taken, or the name of a task.
        out: the new folder; nothing may be there.
        merge_group: average each group of a PanGu-Σ run to one FFN.
        model: the base model, where it is not where the run says.
        stream: of the run, where it is not where it says; needed for the cost of `merge_group` alone.

    Returns:
        {"path", "task", "domain", "model_type" (of transformers, or `moses`), "perplexity_before", "perplexity_after" (None without `merge_group`)}.

    Raises:
        RunError: `unknown_domain`.
        MosesError: before anything is written.
    """
    folder = require_free(Path(out))
    with _core.Store.open(path) as store:
        config = read_config(store)
        registry = _core.Registry.from_bytes(store.read(REGISTRY)) if REGISTRY in store.files() else _core.Registry()
        task = _task_of(registry, domain, path)
        base = load_base(config, model)
        plain = copy.deepcopy(base)
        method = require_growing(load_method(store, config, base)[0], path)
    costs: dict[str, float | None] = {"perplexity_before": None, "perplexity_after": None}
    if isinstance(method, PanguSigmaMethod):
        made = _without_table(method, task.id, plain, merge_group)
        if merge_group and method.config.experts_per_group > 1:
            batches = _test_batches(path, task.name, model, stream)
            with method.answer(task.name):
                costs["perplexity_before"] = perplexity(method.model, batches)
            costs["perplexity_after"] = perplexity(made, batches)
    elif isinstance(method, LifelongMoEMethod):
        made = _as_mixture(method, task.name, plain)
    else:
        raise SurgeryError(f"{path}: {config.method} has no sub-models to extract", code="no_mixture")
    tokenizer = None
    if config.model.source is not None and not isinstance(model, nn.Module):
        tokenizer = load_model(model or config.model.source, config.model.dtype)[1]
    save_model(made, folder, tokenizer)
    own = any(isinstance(part, MixtureFFN) for part in made.modules())
    kind = "moses" if own else str(made.config.model_type)
    return {"path": str(folder), "task": task.name, "domain": task.domain, "model_type": kind, **costs}


def _task_of(registry: _core.Registry, domain: str, path: Any) -> _core.TaskInfo:
    ended = [info for info in registry.tasks() if info.state == "ended"]
    found = [info for info in ended if domain in (info.domain, info.name)]
    if not found:
        known = ", ".join(dict.fromkeys(info.domain or info.name for info in ended)) or "none"
        raise RunError(f"{path}: has no domain {domain!r}; it has {known}", code="unknown_domain")
    return found[-1]


def _test_batches(
    path: Any, name: str, model: nn.Module | str | None, stream: Stream | str | None
) -> list[dict[str, Tensor]]:
    source = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    with open_session(path, source, stream) as session:
        task = next((task for task in session.stream.tasks if task.name == name), None)
        return [] if task is None else batches_of(session, task, "test")


@torch.no_grad()
def _without_table(method: PanguSigmaMethod, task: int, plain: Any, merge: bool) -> Any:
    """The base model with a group in the places of its FFNs: dense for one expert or an average, else by a table."""
    ffns = {ffn.path: ffn for ffn in dense_ffns(plain)}
    for row, (path, layer) in enumerate(method.layers.items()):
        group = method.used_experts(task, path)
        if len(group) == 1 or merge:
            use = method.use.get(task)
            shares = _shares(None if use is None else use[row], method.units(path, group))
            slot = Slot((group[0],)) if len(group) == 1 else Slot(tuple(group), shares)
            parts = {name: slot_rows(part, [slot])[0] for name, part in layer.expert_tensors().items()}
            ffns[path].load(parts["into"], parts["out"])
        else:
            _put_table(plain, path, layer, group, method.table_of(task, path))
    return plain


def _shares(use: Tensor | None, units: list[int]) -> tuple[float, ...]:
    tokens = [0 if use is None or unit >= use.shape[0] else int(use[unit]) for unit in units]
    total = sum(tokens)
    return tuple(count / total if total else 1 / len(tokens) for count in tokens)


def _put_table(plain: Any, path: str, layer: GrowingLayer, group: list[int], table: Tensor) -> None:
    router = RandomRouter(int(table.shape[0]), 1, len(group))
    router.table.copy_(table[None])
    d_model, d_ff = (int(size) for size in layer.out.shape[1:])
    mixture = MixtureFFN(
        d_model,
        d_ff,
        router,
        kind="gate_up_down" if layer.gated else "up_down",
        activation=layer.activation,
        block=path.rpartition(".")[0],
    ).to(layer.out.dtype)
    parts: Any = mixture.experts
    parts.into.copy_(layer.into[group])
    parts.out.copy_(layer.out[group])
    plain.set_submodule(path, mixture.eval())


@torch.no_grad()
def _as_mixture(method: LifelongMoEMethod, name: str, plain: Any) -> Any:
    """The base model, upcycled or grown to the number of experts that a task uses, with these experts in it."""
    task = method.registry.task(name).id
    counts = {path: method.base_experts[path] + len(method.used_experts(task, path)) for path in method.layers}
    blocks = {block.path: block for block in moe_blocks(plain)}
    if len(set(counts.values())) > 1:
        raise SurgeryError(
            f"task {name!r} uses {sorted(set(counts.values()))} experts in different layers, and a class has one number; grow all layers alike",
            code="uneven_layers",
        )
    count = next(iter(counts.values()))
    if blocks:
        parts = []
        for path in method.layers:
            block = blocks[path]
            kept = tuple(Slot((expert,)) for expert in range(block.num_experts))
            parts.append(LayerSurgery(block.block, block.num_experts, kept + (Slot(new=True),) * (count - len(kept))))
        made = plain
        apply(made, SurgeryPlan(tuple(parts)))
    else:
        numbers = [
            place.index
            for place in growing_places(plain, mixtures=True, every=method.config.every, layers=method.config.layers)
        ]
        made = upcycle(plain, count, layers=numbers, top_k=min(method.config.top_k, count))
    _copy_trunk(method, made)
    for block in moe_blocks(made):
        values = method.layers[block.path].expert_tensors()
        for target, key in ((block.into, "into"), (block.out, "out"), (str(block.gate), "gate")):
            tensor = parameter(made, target)
            tensor.copy_(values[key][:count].to(tensor.dtype))
    return made.eval()


def _copy_trunk(method: GrowingMethod, made: Any) -> None:
    """Where the trunk was trained, its latest values."""
    there = dict(made.named_parameters())
    for name, value in method.trained_trunk().items():
        if name in there and there[name].shape == value.shape:
            there[name].copy_(value)
