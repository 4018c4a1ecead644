"""Surgery on runs of growing experts: `moses grow RUN`, `moses prune RUN`.

The run that is read stays as it is; what is written is another folder, in one commit, after everything has been checked. Ids stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _core
from .checkpoint import load_base, load_method, read_config, task_files
from .errors import SurgeryError
from .growth.calibrate import calibration_batches
from .growth.folder import require_free
from .growth.usage import measure_use
from .methods.growing import GrowingMethod
from .run_files import REGISTRY, RESULTS, adapter_file
from .session import Session, open_session
from .stream import Stream, Task, load_stream
from .surgery.plan import Slot


@dataclass(frozen=True)
class RunSurgery:
    """What was done, or would be.

    Attributes:
        path: the new folder; None for a dry run.
        experts_before, experts_after: by the layer's path, the base model's counted.
        bytes_before, bytes_after: of the tasks' files.
        scores_before, scores_after: by task, on its test set, in the task's metric (perplexity for text); empty where they were not asked for.
    """

    path: str | None
    experts_before: dict[str, int]
    experts_after: dict[str, int]
    bytes_before: int
    bytes_after: int
    scores_before: dict[str, float | None]
    scores_after: dict[str, float | None]


def grow_run(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    layers: Literal["all"] | Sequence[str | int] = "all",
    add: int = 4,
    source: Literal["most-used", "fresh"] | int = "most-used",
    noise: float = 0.01,
    seed: int = 0,
    name: str | None = None,
    model: nn.Module | str | None = None,
) -> RunSurgery:
    """Add experts to a Lifelong-MoE run, as a task of its own that nobody trained: the others keep every bit, and `moses forget` undoes it.

    Args:
        path: the run.
        out: the new run; nothing may be there.
        layers: paths of growing layers, of their blocks, or blocks' numbers.
        add: experts a layer.
        source: what they are copied from: the `most-used` ones over the training of all tasks, the expert of this number, or nothing (`fresh`).
        noise: on a copy, relative to the deviation of each tensor.
        seed: of noise and fresh experts.
        name: of the new task; None is `grown-` and its number.
        model: the base model, where it is not where the run says.

    Raises:
        MosesError: before anything is written.
    """
    folder = require_free(Path(out))
    with _core.Store.open(path) as store:
        method = _growing_method(store, path, model)
        if isinstance(add, bool) or not isinstance(add, int) or add < 1:
            raise SurgeryError(f"add is {add!r}; it must be a number of experts from 1", code="bad_plan")
        before = _experts(method)
        slots = {place: _new_slots(method, place, add, source, noise) for place in _chosen(method, layers)}
        number = max((info.id for info in method.registry.tasks()), default=-1) + 1
        task = name or f"grown-{number}"
        method.add_experts(task, slots, seed)
        put = {REGISTRY: method.registry.to_bytes()} | task_files(method, None, task)
        return _write(store, folder, method, put, before)


def prune_run(
    path: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    keep_usage: float | None = None,
    to: int | None = None,
    budget: int | None = None,
    experts: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    by: Literal["use", "norm"] = "use",
    layers: Literal["all"] | Sequence[str | int] = "all",
    calibrate: Stream | str | None = None,
    dry_run: bool = False,
    model: nn.Module | str | None = None,
    stream: Stream | str | None = None,
) -> RunSurgery:
    """Take experts out of a Lifelong-MoE run; give one of the first four.

    Args:
        path: the run.
        out: the new run; nothing may be there. Not needed for a dry run.
        keep_usage: share of each layer's tokens that what stays has now, the base model's experts included, which always stay.
        to: experts that stay in each layer, the base model's included.
        budget: bytes of the tasks' experts that stay, as many of each layer as fit.
        experts: those that go, by their places in every layer or by a layer's path.
        by: which go first: the least used, or those of the least router-weighted activation norm on `calibrate` (REAP, arXiv 2510.13999).
        layers: as in `grow_run`.
        calibrate: a stream on whose training examples use is measured; None takes what was counted in training.
        dry_run: report what it would cost, and write nothing.
        model, stream: of the run, where they are not where it says.

    Returns:
        With the scores of every task before and after.

    Raises:
        MosesError: before anything is written.
    """
    given = [
        name
        for name, value in (("keep_usage", keep_usage), ("to", to), ("budget", budget), ("experts", experts))
        if value is not None
    ]
    if len(given) != 1 or (by == "norm" and calibrate is None):
        raise SurgeryError(
            f"prune was given {', '.join(given) or 'nothing'} and by={by!r}; give one of keep_usage, to, budget, experts, and a stream for norm",
            code="bad_plan",
        )
    if out is None and not dry_run:
        raise SurgeryError("prune writes another run: give --out, or --dry-run", code="bad_plan")
    folder = None if dry_run or out is None else require_free(Path(out))
    with open_session(path, model, stream) as session:
        method = require_growing(session.method, path)
        places = _chosen(method, layers)
        if experts is not None:
            gone = {place: list(experts) for place in places} if not isinstance(experts, Mapping) else dict(experts)
            for place in gone:
                _require_layer(method, place)
        else:
            scores = _scores(session, method, places, calibrate, by)
            gone = _gone(method, scores, keep_usage, to, budget)
        before = _experts(method)
        scores_before = _task_scores(session)
        method.drop_experts({place: sorted(set(numbers)) for place, numbers in gone.items() if numbers})
        scores_after = _task_scores(session)
        put = {REGISTRY: method.registry.to_bytes()}
        for info in method.registry.tasks():
            put |= task_files(method, None, info.name)
        return _write(session.store, folder, method, put, before, scores_before, scores_after)


# -- reading -----------------------------------------------------------------------------------------------------------


def _growing_method(store: _core.Store, path: Any, model: nn.Module | str | None) -> GrowingMethod:
    config = read_config(store)
    return require_growing(load_method(store, config, load_base(config, model))[0], path)


def require_growing(method: Any, path: Any) -> GrowingMethod:
    """The method of a run, which must have growing experts. Raises `SurgeryError` (`no_mixture`)."""
    if not isinstance(method, GrowingMethod):
        raise SurgeryError(
            f"{path}: a run of {method.name} has no growing experts; surgery works on runs of lifelong-moe and pangu-sigma",
            code="no_mixture",
        )
    return method


def _chosen(method: GrowingMethod, layers: Literal["all"] | Sequence[str | int]) -> list[str]:
    if layers == "all":
        return list(method.layers)
    return [_require_layer(method, layer) for layer in layers]


def _require_layer(method: GrowingMethod, layer: str | int) -> str:
    for path in method.layers:
        block = path.rpartition(".")[0]
        if str(layer) in (path, block, block.rpartition(".")[2]):
            return path
    raise SurgeryError(
        f"the run has no experts at {layer}; it has them at {', '.join(method.layers)}", code="unknown_layer"
    )


def _experts(method: GrowingMethod) -> dict[str, int]:
    return {path: layer.num_experts for path, layer in method.layers.items()}


def _new_slots(method: GrowingMethod, path: str, add: int, source: str | int, noise: float) -> list[Slot]:
    if source == "fresh":
        return [Slot(new=True)] * add
    if source == "most-used":
        best = torch.sort(method.total_use(path), descending=True, stable=True).indices.tolist()
    elif isinstance(source, int) and not isinstance(source, bool):
        best = [source]
    else:
        raise SurgeryError(
            f"source is {source!r}; it must be most-used, fresh or the number of an expert", code="bad_plan"
        )
    return [Slot((best[i % len(best)],), new=True, noise=noise) for i in range(add)]


# -- pruning -----------------------------------------------------------------------------------------------------------


def _scores(
    session: Session, method: GrowingMethod, places: Sequence[str], calibrate: Stream | str | None, by: str
) -> dict[str, Tensor]:
    """(E,) float64 by layer: the higher, the more an expert is worth."""
    if calibrate is None:
        return {place: method.total_use(place).double() for place in places}
    stream = calibrate if isinstance(calibrate, Stream) else load_stream(calibrate)
    batches = [batch for task in stream.tasks for batch in batches_of(session, task, "train")]
    with method.context.use():
        use = measure_use(method.model, batches, norms=by == "norm")
    found = {}
    for place in places:
        part = use[place.rpartition(".")[0]]
        found[place] = part.norm if by == "norm" else part.tokens.double()
    return found


def _gone(
    method: GrowingMethod, scores: Mapping[str, Tensor], keep_usage: float | None, to: int | None, budget: int | None
) -> dict[str, list[int]]:
    base = method.base_experts
    if keep_usage is not None and not 0.0 < keep_usage <= 1.0:
        raise SurgeryError(f"keep_usage is {keep_usage!r}; it must be a share above 0 and at most 1", code="bad_plan")
    if to is not None and any(to < base[place] or to < 1 for place in scores):
        place = max(scores, key=lambda name: base[name])
        raise SurgeryError(
            f"{place}: {base[place]} experts are the base model's, which stay; keep at least as many, not {to}",
            code="no_expert_left",
        )
    most = None if budget is None else _within(method, scores, budget)
    gone = {}
    for place, worth in scores.items():
        first, count = base[place], worth.shape[0]
        order = sorted(range(first, count), key=lambda expert: (-float(worth[expert]), expert))
        if keep_usage is not None:
            kept, total = float(worth[:first].sum()), float(worth.sum())
            number = 0
            while number < len(order) and kept < keep_usage * total - 1e-9:
                kept += float(worth[order[number]])
                number += 1
        else:
            number = (to - first) if to is not None else (most or 0)
        gone[place] = sorted(order[number:])
    return gone


def _within(method: GrowingMethod, scores: Mapping[str, Tensor], budget: int) -> int:
    """As many added experts a layer as `budget` bytes hold."""
    base, sizes = method.base_experts, method.expert_bytes()
    others = sum(
        sizes[path] * (layer.num_experts - base[path]) for path, layer in method.layers.items() if path not in scores
    )
    for number in range(max(worth.shape[0] - base[place] for place, worth in scores.items()), -1, -1):
        held = sum(sizes[place] * min(number, worth.shape[0] - base[place]) for place, worth in scores.items())
        if others + held <= budget:
            return number
    raise SurgeryError(
        f"budget is {budget:,} bytes and the layers that are not cut have {others:,}; give more",
        code="budget_too_small",
    )


def _task_scores(session: Session) -> dict[str, float | None]:
    row = session.final_scores(("til",))["til"]["row"]
    return dict(zip([task.name for task in session.stream.tasks], row, strict=True))


def batches_of(session: Session, task: Task, split: Literal["train", "test"]) -> list[dict[str, Tensor]]:
    """A task's examples as the run trains on them."""
    config = session.train_config
    return calibration_batches(
        task,
        split,
        session.tokenizer,
        session.kind,
        max_length=config.max_length,
        template=config.template,
        batch_size=config.eval_batch_size,
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(
    store: _core.Store,
    folder: Path | None,
    method: GrowingMethod,
    put: dict[str, bytes],
    before: dict[str, int],
    scores_before: dict[str, float | None] | None = None,
    scores_after: dict[str, float | None] | None = None,
) -> RunSurgery:
    """The run of `store` with the files `put` in another folder."""
    files = {name: store.read(name) for name in store.files() if name not in put and name != RESULTS} | put
    if folder is not None:
        with _core.Store.create(folder) as made:
            made.commit(files)
    adapters = {adapter_file(info) for info in method.registry.tasks()}
    return RunSurgery(
        None if folder is None else str(folder),
        before,
        _experts(method),
        sum(info.bytes for name, info in store.files().items() if name in adapters),
        sum(len(data) for name, data in files.items() if name in adapters),
        scores_before or {},
        scores_after or {},
    )
