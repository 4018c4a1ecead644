"""What is in a run folder or a checkpoint, as one JSON document: layers, experts, tasks, masks, bytes. Needs no torch.

Of tensor files only headers are read: a checkpoint of hundreds of gigabytes takes no longer than its list of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moses import _core
from moses.errors import FormatError, ModelError
from moses.growth.folder import DESCRIPTION
from moses.run_config import RunConfig
from moses.run_files import CONFIG, REGISTRY
from moses.surgery.checkpoint import MODEL_TYPES, open_checkpoint
from moses.tensorfile import TensorFile

MANIFEST = "manifest.json"
ADAPTER = "/adapter.safetensors"
INDEX = "model.safetensors.index.json"

KINDS = ("weights", "masks", "routers", "heads", "identifier")
"""What a task's bytes are spent on, in the order in which they are shown."""

MAX_JSON_BYTES = 16 << 20
"""A checkpoint of 100,000 tensors has an index of some 12 MB."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder that is open for reading."""

    path: Path
    store: _core.Store
    registry: _core.Registry
    config: RunConfig

    def task_files(self, task: int) -> list[str]:
        """The names of the files that belong to a task, in both folders of tasks."""
        return [name for name in self.store.files() if task_of(name) == task]

    def adapter(self, task: int) -> TensorFile | None:
        """The tensors that the task added; None where it has none."""
        names = [name for name in self.task_files(task) if name.startswith("tasks/") and name.endswith(ADAPTER)]
        return TensorFile.open(self.store.path(names[0])) if names else None


def task_of(name: str) -> int | None:
    """The task that a file of a run belongs to by its name (`tasks/003-fomc/...` is of task 3); None for the others."""
    parts = name.split("/")
    if len(parts) < 2 or parts[0] not in ("tasks", "identifier"):
        return None
    digits = parts[1].partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 11 else None


@contextmanager
def open_run(path: str | Path) -> Iterator[Run]:
    """Open a run folder for reading; a training that goes on in it is not disturbed.

    Raises StoreError where it is no run, FormatError where its registry or configuration is damaged.
    """
    with _core.Store.open(path) as store:
        files = store.files()
        for name in (REGISTRY, CONFIG):
            if name not in files:
                mend = "restore it from a copy, or start the run again"
                raise FormatError(f"{path}: the run has no {name}; {mend}", code="run_incomplete")
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        yield Run(Path(path), store, registry, RunConfig.from_bytes(store.read(CONFIG)))


def inspect_path(path: str | Path) -> dict[str, Any]:
    """Describe a run folder, a safetensors file, or a folder of them. Raises MosesError or OSError for all else."""
    path = Path(path)
    if (path / MANIFEST).exists():
        with open_run(path) as run:
            return _describe_run(run)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise neither(path)
        return _describe_checkpoint(path, files)
    path.stat()  # FileNotFoundError, before anything is said of its content
    return _describe_checkpoint(path, [path])


def neither(path: Path) -> ModelError:
    """The error for a folder that holds nothing that moses knows."""
    what = f"neither a run (no {MANIFEST}) nor a checkpoint (no *.safetensors)"
    return ModelError(f"{path}: {what}; check the path", code="nothing_to_read")


def task_bytes(run: Run, task: int) -> dict[str, int]:
    """All bytes that a task added to the run, by kind; together they are the sizes of its files and of its masks.

    What an adapter's file has besides tensors (its header) counts as weights.
    """
    counts = dict.fromkeys(KINDS, 0)
    files = run.store.files()
    for name in run.task_files(task):
        kind = "identifier" if name.startswith("identifier/") else "weights"
        counts[kind] += files[name].bytes
    adapter = run.adapter(task)
    for name, tensor in (adapter.tensors if adapter else {}).items():
        kind = "routers" if name == "router" else "heads" if name.startswith("head.") else "weights"
        counts["weights"] -= tensor.num_bytes
        counts[kind] += tensor.num_bytes
    counts["masks"] = run.registry.mask_bytes(task)
    return counts


def read_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises FormatError where it is something else."""
    if len(data) > MAX_JSON_BYTES:
        what = f"it has {len(data)} bytes, over the limit of {MAX_JSON_BYTES}"
        raise FormatError(f"{path}: {what}; restore it from a copy", code="json_too_large")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error}); restore it from a copy", code="json_damaged") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path}: not a JSON object; restore it from a copy", code="json_damaged")
    return document


def _describe_run(run: Run) -> dict[str, Any]:
    registry, files = run.registry, run.store.files()
    tasks = registry.tasks()
    return {
        "kind": "run",
        "path": str(run.path),
        "generation": run.store.generation,
        "unfinished_commit": (run.path / ".pending").exists(),
        "files": {"count": len(files), "bytes": sum(info.bytes for info in files.values())},
        "method": run.config.method,
        "seed": run.config.train_config.get("seed"),
        "model": asdict(run.config.model),
        "stream": None if run.config.stream is None else asdict(run.config.stream),
        "bank": {
            "bytes": registry.total_bytes(),
            "used_bytes": registry.used_bytes(),
            "fraction": registry.bank_fraction(),
            "layers": len(registry.layers()),
            "experts": sum(len(layer.expert_ids) for layer in registry.layers()),
        },
        "layers": [_describe_layer(registry, layer) for layer in registry.layers()],
        "tasks": [_describe_task(run, task) for task in tasks],
        "overlap": registry.overlap(),
        "history": registry.history(),
    }


def _describe_layer(registry: _core.Registry, layer: _core.LayerInfo) -> dict[str, Any]:
    used_units = [registry.used(layer.id, space.name).count for space in layer.spaces]
    spaces = [
        {
            "name": space.name,
            "units": space.length,
            "units_per_expert": space.units_per_expert,
            "unit_bytes": space.unit_bytes,
            "used": used,
        }
        for used, space in zip(used_units, layer.spaces, strict=True)
    ]
    return {
        "id": layer.id,
        "name": layer.name,
        "experts": layer.expert_ids,
        "bytes": sum(space.length * space.unit_bytes for space in layer.spaces),
        "used_bytes": sum(used * space.unit_bytes for used, space in zip(used_units, layer.spaces, strict=True)),
        "spaces": spaces,
    }


def _describe_task(run: Run, task: _core.TaskInfo) -> dict[str, Any]:
    registry = run.registry
    ended = task.state == "ended"
    places = [(layer.id, space.name) for layer in registry.layers() for space in layer.spaces]
    masks = [registry.mask(task.id, *place).count if ended else 0 for place in places]
    adapter = run.adapter(task.id)
    return {
        "id": task.id,
        "name": task.name,
        "domain": task.domain,
        "state": task.state,
        "content_hash": task.content_hash,
        "masks": sum(count > 0 for count in masks),
        "units": sum(masks),
        "new_weight_bytes": registry.new_bytes(task.id) if ended else 0,
        "bytes": task_bytes(run, task.id),
        "tensors": [] if adapter is None else _tensors(adapter),
    }


def _describe_checkpoint(path: Path, paths: list[Path]) -> dict[str, Any]:
    files = [TensorFile.open(file) for file in paths]
    tensors = [{**tensor, "file": file.path.name} for file in files for tensor in _tensors(file)]
    by_dtype: dict[str, int] = {}
    for tensor in tensors:
        by_dtype[tensor["dtype"]] = by_dtype.get(tensor["dtype"], 0) + tensor["bytes"]
    config, layout = _config_of(path)
    known = config.get("model_type") in MODEL_TYPES and not layout
    experts = open_checkpoint(path).document if known else None
    return {
        "kind": "checkpoint",
        "path": str(path),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "layout": layout,
        "files": [
            {
                "name": file.path.name,
                "bytes": file.path.stat().st_size,
                "tensors": len(file.tensors),
                "metadata": dict(file.metadata),
            }
            for file in files
        ],
        "num_tensors": len(tensors),
        "num_values": sum(tensor.num_values for file in files for tensor in file.tensors.values()),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "bytes_by_dtype": by_dtype,
        "tensors": tensors,
    } | (
        {}
        if experts is None
        else {key: experts[key] for key in ("top_k", "groups", "superseded", "layers", "left_out")}
    )


def _config_of(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The config of a folder of transformers, or of moses's own with what stands elsewhere than the config has it."""
    for name in (CONFIG, DESCRIPTION):
        file = path / name
        if file.is_file():
            document = read_json(file, file.read_bytes())
            if name == CONFIG:
                return document, []
            config, layout = document.get("config"), document.get("layout")
            if (
                not isinstance(config, dict)
                or not isinstance(layout, list)
                or not all(isinstance(p, dict) for p in layout)
            ):
                raise FormatError(f"{file}: no config and layout; restore it from a copy", code="damaged_layout")
            return {**config, "architectures": [document.get("architecture")]}, layout
    return {}, []


def _tensors(file: TensorFile) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.num_bytes}
        for name, tensor in file.tensors.items()
    ]
