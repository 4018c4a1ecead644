"""Names of the files of a run folder, in one place. Needs no torch."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Protocol

CONFIG = "config.json"
REGISTRY = "registry.moses"
PROGRESS = "progress.json"
RESULTS = "results.json"
LOG = "log.jsonl"
TRAINER = "trainer"
FORMAT_VERSION = 1


class _Named(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...


def is_run(path: str | PathLike[str]) -> bool:
    """Whether the folder holds a run's manifest."""
    return (Path(path) / "manifest.json").is_file()


def task_folder(task: _Named) -> str:
    """Folder of a task: its id, which is unique, and its name as far as a file name can hold it."""
    return f"tasks/{task.id:03d}-{_safe(task.name)}"


def adapter_file(task: _Named) -> str:
    """What a task added to the model."""
    return f"{task_folder(task)}/adapter.safetensors"


def identifier_file(task: _Named) -> str:
    """What the task identifier holds of a task."""
    return f"identifier/{task.id:03d}-{_safe(task.name)}.safetensors"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60] or "task"
