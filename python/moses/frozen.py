"""Frozen bits: do a task's weights still hash to what they were at its end, and are they those of an older copy?

A task's weights lie in the files of the tasks that own them; they are put together again and hashed, never looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from moses._core import TaskInfo
from moses.inspect import Run, open_run, task_of
from moses.run_files import CONFIG, REGISTRY
from moses.verdict import COPY, Verdict


def check_tasks(verdict: Verdict, run: Run) -> dict[int, str]:
    """The recomputed content hash of every ended task whose files allow it; what does not fit is a problem.

    A method without a bank has no content hashes: the result is empty then.
    """
    tasks = {task.id: task for task in run.registry.tasks()}
    for name in run.store.files():
        owner = task_of(name)
        if owner is not None and owner not in tasks:
            what = f"it is of task {owner}, which the registry does not have"
            verdict.add(run.store.path(name), "orphan_file", what, COPY)
    if not run.registry.layers():
        return {}
    values = _owned_values(verdict, run, tasks)
    hashes = {}
    for task in tasks.values():
        if task.state == "ended" and task.id in values:
            path = _adapter_path(run, task.id)
            found = verdict.caught(path, partial(run.registry.content_hash, task.id, values))
            if found is not None:
                hashes[task.id] = found
                _check_hash(verdict, path, task, found)
    return hashes


def _owned_values(verdict: Verdict, run: Run, tasks: Mapping[int, TaskInfo]) -> dict[int, bytes]:
    """The bytes of the weights that each ended task owns, as its file has them."""
    values = {}
    for task in tasks.values():
        adapter = verdict.caught(run.path / "tasks", partial(run.adapter, task.id))
        if adapter is None and task.state == "ended":
            what = f"task {task.id} ({task.name}) has no adapter that can be read"
            verdict.add(run.path / "tasks", "adapter_missing", what, COPY)
        elif adapter is not None and "weights" not in adapter.tensors:
            verdict.add(adapter.path, "weights_missing", "it has no tensor 'weights'", COPY)
        elif adapter is not None:
            values[task.id] = adapter.read("weights")
    return values


def _check_hash(verdict: Verdict, path: str, task: TaskInfo, found: str) -> None:
    named = f"task {task.id} ({task.name})"
    if task.content_hash is None:
        verdict.add(path, "content_hash_missing", f"{named} ended without a content hash", COPY)
    elif found != task.content_hash:
        expected = task.content_hash[:16]
        what = f"{named}: its weights hash to {found[:16]}…, not to the {expected}… of its end"
        verdict.add(path, "content_hash_differs", what, COPY)


def compare_tasks(verdict: Verdict, run: Run, hashes: Mapping[int, str], against: Path) -> None:
    """Every task that ended in the older run has the same weights, masks, router and head, or was forgotten on purpose.

    `hashes` are those of `check_tasks`. Raises MosesError or OSError where `against` is no run.
    """
    with open_run(against) as old:
        older = Verdict(str(against), "run")
        old_hashes = check_tasks(older, old)
        verdict.problems += older.problems
        if old.config.model.fingerprint != run.config.model.fingerprint:
            mend = "compare runs of one base model"
            verdict.add(run.store.path(CONFIG), "model_differs", f"the base model is not that of {against}", mend)
        now = {task.id: task for task in run.registry.tasks()}
        history = run.registry.history()
        shown = {task["id"]: task for task in verdict.tasks}
        for task in old.registry.tasks():
            if task.state != "ended":
                continue
            if task.id not in now or now[task.id].state != "ended":
                if f"task {task.id} forgotten" in history:
                    verdict.notes.append(f"task {task.id} ({task.name}) was forgotten since")
                else:
                    what = f"task {task.id} ({task.name}) of {against} is not there, and was never forgotten"
                    verdict.add(run.store.path(REGISTRY), "task_lost", what, COPY)
                continue
            changed = list(_changes(old, run, task.id))
            # without a hash nothing is proven
            if old.registry.layers() and (task.id not in hashes or old_hashes.get(task.id) != hashes[task.id]):
                changed.append("weights")
            if now[task.id].name != task.name:
                changed.append("name")
            shown[task.id]["identical"] = not changed
            if changed:
                what = f"task {task.id} ({task.name}) is not what it was in {against}: {', '.join(changed)} changed"
                verdict.add(_adapter_path(run, task.id), "frozen_bits_changed", what, COPY)


def _changes(old: Run, new: Run, task: int) -> Iterator[str]:
    """What of a task besides its weights differs between two runs."""
    layers = {layer.id: layer for layer in new.registry.layers()}
    for layer in old.registry.layers():
        lengths = {space.name: space.length for space in layers[layer.id].spaces} if layer.id in layers else {}
        for space in layer.spaces:
            before = old.registry.mask(task, layer.id, space.name)
            # a bank only grows, so a mask of an older copy may be shorter
            grown = lengths.get(space.name, -1) >= space.length
            if not grown or before.resized(lengths[space.name]) != new.registry.mask(task, layer.id, space.name):
                yield f"mask of {layer.name} ({space.name})"
    before_file, after_file = old.adapter(task), new.adapter(task)
    before_tensors = {} if before_file is None else before_file.tensors
    after_tensors = {} if after_file is None else after_file.tensors
    for name in sorted(before_tensors.keys() | after_tensors.keys()):
        # weights move between files when an owner is forgotten: their content hash says whether they are the same
        if name == "weights" and old.registry.layers():
            continue
        if before_file is None or after_file is None or name not in before_tensors or name not in after_tensors:
            yield name
            continue
        one, two = before_tensors[name], after_tensors[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape) or before_file.read(name) != after_file.read(name):
            yield name


def _adapter_path(run: Run, task: int) -> str:
    names = [name for name in run.task_files(task) if name.startswith("tasks/")]
    return run.store.path(names[0]) if names else str(run.path / "tasks")
