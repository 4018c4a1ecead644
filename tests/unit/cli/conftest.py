"""A small run folder of real files, made without a model: two layers, two experts of rank 2, three tasks that share."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moses import _core
from moses.run_config import ModelSource, RunConfig, StreamSource
from moses.run_files import CONFIG, REGISTRY, adapter_file, identifier_file

GOLDEN = Path(__file__).parents[2] / "golden"
TASKS = ("emotion", "topic", "trec")
UNITS = {"emotion": ({0, 1}, {2}), "topic": ({1, 2}, {2, 3}), "trec": ({0, 2}, {3})}
D_IN, D_OUT = 3, 4
UNIT_BYTES = (D_IN + D_OUT) * 4


def save(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file whose bytes depend on no version of any library."""
    names = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in sorted(tensors.items()):
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype.str], "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def unit_values(layer: int, unit: int) -> bytes:
    """The values of a component, the same in every run: small numbers, no NaN."""
    seed = hashlib.sha256(f"{layer}/{unit}".encode()).digest()
    return (np.frombuffer(seed, np.uint8)[: UNIT_BYTES // 4].astype("<f4") / 256).tobytes()


def weights_of(registry: _core.Registry, task: int) -> np.ndarray:
    """What the task's file holds: the values of the units that it owns, in canonical order."""
    units = (
        (layer.id, int(unit))
        for layer in registry.layers()
        for unit in np.frombuffer(registry.owned(task, layer.id, "components").to_indices(), "<u8")
    )
    return np.frombuffer(b"".join(unit_values(*unit) for unit in units), "<f4")


def task_tensors(registry: _core.Registry, task: int) -> dict[str, np.ndarray]:
    router = np.full(8, task + 0.5, "<f4")
    return {"weights": weights_of(registry, task), "router": router, "head.weight": np.full((2, 4), task, "<f4")}


def run_config(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "method": "moses",
        "method_config": {"num_experts": 2, "rank": 2},
        "train_config": {"seed": 7},
        "identifier_config": {},
        "model": ModelSource("tiny-model", "causal", "llama", "float32", "f" * 64),
        "stream": StreamSource("streams/demo", "demo", TASKS, dict.fromkeys(TASKS, "accuracy"), "d" * 64),
        "formats": {},
    }
    return RunConfig(**(fields | changes))


def results(tasks: tuple[str, ...] = TASKS, **changes: Any) -> dict[str, Any]:
    """A results.json: row t is 60 + i for learned tasks and 10 for the others."""
    size = len(tasks)
    matrix = [[60.0 + i if i <= t else 10.0 for i in range(size)] for t in range(size)]
    metrics = {
        "op": 60.0 + (size - 1) / 2,
        "avg": 60.5,
        "bwt": 0.0 if size > 1 else None,
        "fwt": 5.0,
        "forgetting": 0.0,
    }
    document: dict[str, Any] = {
        "method": "moses",
        "tasks": list(tasks),
        "task_metrics": dict.fromkeys(tasks, "accuracy"),
        "base": [5.0] * size,
        "til": {"matrix": matrix, "metrics": metrics},
        "tail": {
            "matrix": matrix,
            "metrics": metrics | {"op": 58.0},
            "task_accuracy": 97.5,
            "confusion": [[39 if i == j else 0 for j in range(size)] + [1] for i in range(size)],
        },
        "capacity": [
            {
                "task": task,
                "bytes": {"weights": 4000, "masks": 90, "routers": 300, "heads": 0, "identifier": 1000},
                "bank_fraction": min(1.0, 0.1 * (n + 1)),
            }
            for n, task in enumerate(tasks)
        ],
        "overlap": [[84 if i == j else 28 for j in range(size)] for i in range(size)],
        "similar": {tasks[-1]: tasks[0]} if size > 1 else {},
        "expert_use": {task: {f"layers.{layer}": [0.75, 0.25] for layer in range(2)} for task in tasks},
        "seconds": {"train": 12.5, "evaluate": 3.25},
        "config": {"model": {"source": "tiny-model"}, "train_config": {"seed": 7}, "stream": {"digest": "d" * 64}},
        "environment": {"python": "3.11.0"},
    }
    return document | changes


def build_run(path: Path, tasks: tuple[str, ...] = TASKS) -> Path:
    """A run of some of `TASKS`, each committed as a training does it, with results.json and a log beside it."""
    registry = _core.Registry()
    for layer in range(2):
        registry.add_layer(f"model.layers.{layer}.mlp.up_proj", 2, [("components", 2, UNIT_BYTES)])
    with _core.Store.create(path) as store:
        store.commit({CONFIG: run_config().to_bytes(), REGISTRY: registry.to_bytes()})
        for name in tasks:
            end_task(registry, name, [(layer, units) for layer, units in enumerate(UNITS[name])])
            info = registry.task(name)
            put = {REGISTRY: registry.to_bytes(), adapter_file(info): save(task_tensors(registry, info.id))}
            put[identifier_file(info)] = save({"sum": np.full(4, info.id, "<f8")})
            store.commit(put)
    (path / "results.json").write_text(json.dumps(results(tasks)))
    (path / "log.jsonl").write_text("{}\n")
    return path


def end_task(registry: _core.Registry, name: str, units: list[tuple[int, set[int]]]) -> None:
    """Begin and end a task with these units of the layers, and note its content hash."""
    task = registry.begin_task(name)
    lengths = {layer.id: layer.spaces[0].length for layer in registry.layers()}
    masks = [(layer, "components", _core.Mask.from_indices(lengths[layer], chosen)) for layer, chosen in units]
    registry.end_task(task, masks)
    owned = {info.id: weights_of(registry, info.id).tobytes() for info in registry.tasks()}
    registry.set_content_hash(task, registry.content_hash(task, owned))


class Runs:
    """What the tests make runs with."""

    tasks = TASKS
    build = staticmethod(build_run)
    results = staticmethod(results)
    config = staticmethod(run_config)
    end_task = staticmethod(end_task)
    task_tensors = staticmethod(task_tensors)
    save = staticmethod(save)


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(tmp_path: Path, whole_run: Path) -> Path:
    """A run of its own for a test that may damage it."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Compare a text with a file of tests/golden; `MOSES_UPDATE_GOLDEN=1` writes it instead."""
    import os

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("MOSES_UPDATE_GOLDEN"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{name} differs; if that is meant, set MOSES_UPDATE_GOLDEN=1"

    yield check


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""
    from moses.cli import main

    monkeypatch.delenv("MOSES_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def run_cli(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_cli
