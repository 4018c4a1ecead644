"""A stream from a folder in TRACE's format: a folder a task, with `train.json`, `eval.json` and `test.json`. A task whose rows
are `{"text"}` is a domain of texts to model.

Order and measures, the first that says so: the caller's list of tasks; `stream.json`, `{"tasks": [...], "metrics":
{task: name}}`; TRACE's own, where folders have its names; the sorted names of the folders, measured by accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moses.errors import StreamError
from moses.stream.balance import spread
from moses.stream.rows import read_json, read_rows
from moses.stream.task import DEFAULT_METRIC, METRICS, TEXT_METRIC, Stream, Task
from moses.stream.trace import TRACE_METRICS, trace_order

SPLITS = ("train", "eval", "test")
# a task's name becomes part of file names in the run's folder
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def load_folder(
    root: Path, tasks: Sequence[str] | None = None, limits: Sequence[int | None] = (None, None, None)
) -> Stream:
    """Read the stream; `limits` caps the rows of train, eval and test of each task, spread evenly over the file.

    Raises StreamError with the file, the field and the mend; errors of the operating system stay OSErrors.
    """
    if not root.exists():
        raise StreamError(f"{root}: there is no such folder: give a folder with a folder a task", code="stream_missing")
    if not root.is_dir():
        raise StreamError(f"{root}: not a folder: give a folder with a folder a task", code="stream_missing")
    order, metrics = _settings(root / "stream.json")
    folders = _task_folders(root)
    if not folders:
        raise StreamError(
            f"{root}: no task in it{_nested_hint(root)}: a task is a folder with train.json", code="stream_empty"
        )
    names = choose_tasks(tasks, folders) if tasks is not None else order
    if names is None:
        names = trace_order(folders)
    for name in names:
        if not _TASK_NAME.fullmatch(name):
            raise StreamError(
                f"{root}: task {name!r}: a name has letters, digits, '.', '_' and '-', 64 at most: rename the folder",
                code="bad_task_name",
            )
        if name not in folders:
            raise StreamError(
                f"{root}/stream.json: 'tasks': no folder {name!r} with train.json: add it or drop the name",
                code="unknown_task",
            )
    for name in metrics:
        if name not in folders:
            raise StreamError(
                f"{root}/stream.json: 'metrics': no task {name!r}: it has {', '.join(folders)}", code="unknown_task"
            )
    return Stream(root.resolve().name, tuple(_task(root / name, metrics.get(name), limits) for name in names))


def choose_tasks(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """The chosen names, checked: at least one, each known, none twice."""
    if not tasks:
        raise StreamError(f"no task chosen: name at least one of {', '.join(known)}", code="unknown_task")
    _refuse_twice(tasks, "the chosen tasks")
    for name in tasks:
        if name not in known:
            raise StreamError(f"unknown task {name!r}: the stream has {', '.join(known)}", code="unknown_task")
    return list(tasks)


def _task(folder: Path, metric: str | None, limits: Sequence[int | None]) -> Task:
    parts = []
    for split, limit in zip(SPLITS, limits, strict=True):
        path = folder / f"{split}.json"
        if not path.exists():
            raise StreamError(
                f"{path}: there is no such file: a task has train.json, eval.json and test.json", code="file_missing"
            )
        parts.append(spread(read_rows(path), limit))
    train, evaluation, test = parts
    of_text = [not rows[0].prompt for rows in parts]
    for split, kind in zip(SPLITS[1:], of_text[1:], strict=True):
        if kind != of_text[0]:
            raise StreamError(
                f"{folder / f'{split}.json'}: its rows are {_kind(kind)} and those of train.json {_kind(of_text[0])}: "
                "give one kind",
                code="mixed_rows",
            )
    default = TEXT_METRIC if of_text[0] else TRACE_METRICS.get(folder.name, DEFAULT_METRIC)
    if metric is not None and (metric == TEXT_METRIC) != of_text[0]:
        raise StreamError(
            f"{folder}: its rows are {_kind(of_text[0])}, which {metric!r} does not score: "
            f"{TEXT_METRIC!r} is for texts, and no other metric",
            code="metric_mismatch",
        )
    name = folder.name
    return Task(name, train, evaluation, test, metric or default, domain=name if of_text[0] else None)


def _kind(of_text: bool) -> str:
    return "texts" if of_text else "prompts"


def _task_folders(root: Path) -> list[str]:
    return sorted(
        entry.name for entry in root.iterdir() if not entry.name.startswith(".") and (entry / "train.json").exists()
    )


def _nested_hint(root: Path) -> str:
    # TRACE's archive unpacks into a folder of folders of tasks
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and _task_folders(entry):
            return f" ({entry} has tasks: give that)"
    return ""


def _settings(path: Path) -> tuple[list[str] | None, dict[str, str]]:
    """The order (None: not given) and the metrics of stream.json."""
    if not path.exists():
        return None, {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise StreamError(f"{path}: must be an object with 'tasks' and 'metrics'", code="bad_settings")
    for field in settings:
        if field not in ("tasks", "metrics"):
            raise StreamError(f"{path}: unknown field {field!r}: it takes 'tasks' and 'metrics'", code="bad_settings")
    order, metrics = settings.get("tasks"), settings.get("metrics", {})
    if order is not None and (not isinstance(order, list) or not order or not _all_strings(order)):
        raise StreamError(f"{path}: 'tasks' must be a list of at least one folder name", code="bad_settings")
    if not isinstance(metrics, dict) or not _all_strings(metrics.values()):
        raise StreamError(f"{path}: 'metrics' must be an object of task: metric", code="bad_settings")
    _refuse_twice(order or (), f"{path}: 'tasks'")
    for name, metric in metrics.items():
        if metric not in METRICS:
            raise StreamError(
                f"{path}: 'metrics': {name}: unknown metric {metric!r}: use one of {', '.join(METRICS)}",
                code="unknown_metric",
            )
    return order, metrics


def _all_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _refuse_twice(names: Sequence[str], where: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise StreamError(f"{where}: task {name!r} is there twice: name it once", code="task_twice")
