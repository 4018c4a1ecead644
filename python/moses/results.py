"""What a run has measured so far (progress.json), and the document that users read (results.json)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors

from . import _core
from .config import TrainConfig, to_json
from .errors import FormatError
from .methods import method_class
from .metrics import transfer_metrics
from .run_config import RunConfig
from .run_files import PROGRESS
from .stream.drift import DriftConfig
from .stream.identify import IdentifierConfig
from .stream.task import LOWER_IS_BETTER, Stream

Row = list[float | None]
METRICS = ("op", "avg", "bwt", "fwt", "forgetting")


@dataclass
class RunProgress:
    """Rows and figures so far.

    Attributes:
        base: R[0].
        rows: after each task: {"til": row, "tail": row, "confusion": counts}, a mode that was not asked for being None.
        capacity: after each task: {"task", "bytes", "bank_fraction"}.
        similar: the earlier task that each task started from.
        expert_use: share of tokens per expert, by task and router, from the last row.
        seconds: time spent, by kind of work.
        given_up: what earlier tasks lost to the budget: [{"for", "lost": {task: share of its weights' size}}].
        budget_used: bytes that count for the budget, after each task.
        online: of a run without task boundaries: how far it is, its segments, and how they score.
    """

    base: Row | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    capacity: list[dict[str, Any]] = field(default_factory=list)
    similar: dict[str, str] = field(default_factory=dict)
    expert_use: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    given_up: list[dict[str, Any]] = field(default_factory=list)
    budget_used: list[int] = field(default_factory=list)
    online: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> RunProgress:
        """Read what `to_bytes` wrote. Raises `FormatError` for anything else."""
        try:
            return RunProgress(**json.loads(data))
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(
                f"{PROGRESS}: not a run's progress: {error}; restore it from a backup", code="bad_progress"
            ) from None


def results_document(config: RunConfig, stream: Stream, done: RunProgress, registry: _core.Registry) -> dict[str, Any]:
    """The content of results.json (design section 5); a mode that was not evaluated is null."""
    lower_is_better = all(task.metric in LOWER_IS_BETTER for task in stream.tasks)
    document: dict[str, Any] = {
        "method": config.method,
        "tasks": [task.name for task in stream.tasks],
        "task_metrics": {task.name: task.metric for task in stream.tasks},
        "lower_is_better": lower_is_better,
        "base": done.base,
    }
    for mode in ("til", "tail"):
        matrix = [row[mode] for row in done.rows if row[mode] is not None]
        complete = len(matrix) == len(stream.tasks)
        metrics = (
            transfer_metrics(matrix, done.base or [None] * len(stream.tasks), lower_is_better)
            if complete
            else dict.fromkeys(METRICS)
        )
        if not method_class(config.method).one_by_one:
            metrics |= dict.fromkeys(("bwt", "fwt", "forgetting"))
        document[mode] = {"matrix": matrix, "metrics": metrics} if matrix else None
        if done.online and matrix:  # there is one row, after the whole stream
            document[mode]["metrics"]["op"] = mean_score(matrix[-1])
    confusion = done.rows[-1]["confusion"] if done.rows else None
    if document["tail"] is not None and confusion is not None:
        asked = sum(map(sum, confusion))
        right = sum(row[index] for index, row in enumerate(confusion))
        document["tail"] |= {"task_accuracy": 100.0 * right / asked if asked else None, "confusion": confusion}
    if config.budget is not None:
        document["budget"] = {"limit": config.budget, "used": done.budget_used, "given_up": done.given_up}
    if done.online:
        document["online"] = {key: value for key, value in done.online.items() if key != "position"}
    return document | {
        "capacity": done.capacity,
        "overlap": registry.overlap() if registry.layers() else None,
        "similar": done.similar,
        "expert_use": done.expert_use,
        "seconds": done.seconds,
        "command": command(config),
        "config": json.loads(config.to_bytes()),
        "environment": environment(),
    }


def command(config: RunConfig) -> str:
    """The command line that makes such a run, with every setting that is not the default; RUN, and MODEL or STREAM where one was given in
    memory, are left open."""
    stream = config.stream
    words = ["moses", "train", "--model", config.model.source or "MODEL"]
    online = config.online
    if stream is not None:
        visits = stream.tasks if online is None else online["visits"]
        words += ["--stream", stream.source or "STREAM", "--tasks", ",".join(visits)]
    words += ["--method", config.method, "--out", "RUN"]
    words += ["--boundaries", "none"] if online is not None else []
    words += ["--budget", str(config.budget)] if config.budget is not None else []
    plain = {**to_json(method_class(config.method).config_class()), **to_json(TrainConfig())}
    chosen = {**config.method_config, **config.train_config}
    settings = {key: value for key, value in chosen.items() if key not in plain or plain[key] != value}
    seed = settings.pop("seed", 0)
    words += ["--seed", str(seed)] if seed else []
    if online is not None:
        usual = to_json(DriftConfig())
        settings |= {f"drift.{key}": value for key, value in online["drift"].items() if usual.get(key) != value}
        settings["horizon"] = online["horizon"]
        settings.pop("epochs", None)  # it is one
    identifier = to_json(IdentifierConfig())
    settings |= {
        f"identifier.{key}": value for key, value in config.identifier_config.items() if identifier.get(key) != value
    }
    if config.model.source is not None:
        settings["dtype"] = config.model.dtype
    for key, value in settings.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def mean_score(row: Row) -> float | None:
    """The mean of the cells that there are."""
    cells = [cell for cell in row if cell is not None]
    return sum(cells) / len(cells) if cells else None


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat the run."""
    import torch

    names = ("moses-cl", "torch", "transformers", "accelerate", "peft", "numpy", "safetensors")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def task_bytes(files: dict[str, bytes], registry_bytes: int) -> dict[str, int]:
    """Bytes on disk that a task's files add, by kind; a file's header counts with its largest kind.

    `weights` are all adapter tensors of no other kind; `masks` what the registry's file grew by.
    """
    sizes = {"weights": 0, "masks": registry_bytes, "routers": 0, "heads": 0, "identifier": 0}
    for name, data in files.items():
        if name.startswith("identifier/"):
            sizes["identifier"] += len(data)
            continue
        payload = 0
        for key, tensor in safetensors.deserialize(data):  # type: ignore[no-untyped-call]
            size = len(tensor["data"])
            payload += size
            sizes["routers" if key == "router" else "heads" if key.startswith("head.") else "weights"] += size
        sizes["weights"] += len(data) - payload
    return sizes
