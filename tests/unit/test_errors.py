"""Every code of the core can be raised, as its class, with one line that says how to mend it."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moses.errors
from moses import _core
from moses._core import Mask, Registry, Store, error_codes, hash_buffers, safetensors_header
from moses.errors import MosesError

TREE = [
    "ConfigError",
    "StreamError",
    "ModelError",
    "DispatchError",
    "KernelError",
    "RegistryError",
    "StoreError",
    "FormatError",
    "RunError",
    "SurgeryError",
]


def registry() -> Registry:
    """One layer of eight units; task 0 uses 0 to 3, task 1 uses 3 to 5, task 2 is open."""
    made = Registry()
    layer = made.add_layer("layer", 2, [("components", 4, 2)])
    for name, units in (("zero", [0, 1, 2, 3]), ("one", [3, 4, 5])):
        made.end_task(made.begin_task(name), [(layer, "components", Mask.from_indices(8, units))])
    made.begin_task("two")
    return made


def sealed(content: bytes) -> bytes:
    from moses._core import blake3_hex

    return content + bytes.fromhex(blake3_hex(content))


def inconsistent() -> bytes:
    """Bytes with a right checksum whose only event names a task that never was."""
    data = Registry().to_bytes()[:-32]
    history = data.rindex(b"\x03" + (1).to_bytes(8, "little"))
    return sealed(data[:history] + b"\x03" + (3).to_bytes(8, "little") + b"\x01\x03\x07")


def store(folder: Path) -> Store:
    made = Store.create(folder / "run")
    made.commit({"a": b"1"})
    return made


def opened(folder: Path, write: bool = False) -> Store:
    store(folder).close()
    return Store.open(folder / "run", write=write)


def closed(folder: Path) -> Store:
    made = store(folder)
    made.close()
    return made


def damaged(folder: Path) -> Store:
    made = store(folder)
    (folder / "run" / "a").write_bytes(b"2")
    return made


def missing(folder: Path) -> Store:
    made = store(folder)
    (folder / "run" / "a").unlink()
    return made


def changed(folder: Path) -> Store:
    writer = store(folder)
    reader = Store.open(folder / "run")
    writer.commit({"a": b"2"})
    return reader


def taken(folder: Path) -> Store:
    made = store(folder)
    for name in ("b", "b.g2"):
        (folder / "run" / name).write_bytes(b"mine")
    return made


def manifest(folder: Path, **changes: object) -> Path:
    closed(folder)
    path = folder / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder / "run"


def shard(folder: Path) -> Path:
    (folder / "x.safetensors").write_bytes(b"\xff" * 20)
    return folder / "x.safetensors"


def plan(ids: list[int], top_k: int) -> None:
    numbers = [np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros(3, np.int64), np.zeros(2, np.int64)]
    _core.dispatch_plan(np.array(ids), top_k, 2, None, False, *numbers, 1)


def rows(index: int) -> None:
    order, inverse = np.array([index], np.int32), np.zeros(1, np.int32)
    _core.gather(np.zeros((1, 4), np.uint8), 4, order, inverse, 1, np.zeros((1, 4), np.uint8), 1)


def mixture(folder: Path, gate: int = 2, name: str = "source", **config: object) -> Path:
    """A Mixtral of one layer, two experts and nothing else, in one indexed shard."""
    path = folder / name
    path.mkdir()
    block = "model.layers.0.block_sparse_moe"
    names = [f"{block}.experts.{expert}.{part}.weight" for expert in (0, 1) for part in ("w1", "w2", "w3")]
    shapes = {f"{block}.gate.weight": [gate, 1]} | {name: [1, 1] for name in names} | {"norm.weight": [1]}
    header, end = {}, 0
    for tensor, shape in shapes.items():
        begin, end = end, end + 4 * shape[0]
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    index(path, dict.fromkeys(shapes, "m.safetensors"))
    fields = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1} | config
    (path / "config.json").write_text(json.dumps(fields))
    return path


def index(path: Path, weight_map: dict[str, str]) -> Path:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def indexed(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    names = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    change(names)
    _core.Checkpoint.open(index(path, names))


def job(path: Path, *slots: object, layout: str | None = None, **fields: object) -> _core.SurgeryJob:
    from moses.surgery import LayerSurgery, Slot, SurgeryPlan

    made = [slot if isinstance(slot, Slot) else Slot((slot,)) for slot in slots]
    layers = (LayerSurgery("model.layers.0", 2, tuple(made)),) if made else ()
    plan = SurgeryPlan(layers, **fields).to_json()
    return _core.SurgeryJob.plan([_core.Checkpoint.open(path)], plan, "test", layout)


def extra(path: Path, name: str) -> Path:
    (path / name).write_bytes(b"")
    return path


def deep(folder: Path, kept: list[int]) -> None:
    """Two layers of four experts in two groups, the first of which keeps fewer."""
    from moses.surgery import LayerSurgery, Slot, SurgeryPlan

    path = folder / "deep"
    path.mkdir()
    header: dict[str, object] = {}
    begin = 0
    for layer in (0, 1):
        block = f"model.layers.{layer}.mlp"
        for name, shape in (
            ("gate.weight", [4, 1]),
            ("experts.gate_up_proj", [4, 2, 1]),
            ("experts.down_proj", [4, 1, 1]),
        ):
            size = 8 if "up" in name else 4
            header[f"{block}.{name}"] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(begin))
    config = {
        "model_type": "deepseek_v2",
        "n_routed_experts": 4,
        "num_experts_per_tok": 1,
        "n_group": 2,
        "topk_group": 1,
    }
    (path / "config.json").write_text(json.dumps(config | {"topk_method": "group_limited_greedy"}))
    plan = SurgeryPlan((LayerSurgery("model.layers.0", 4, tuple(Slot((expert,)) for expert in kept)),))
    _core.SurgeryJob.plan([_core.Checkpoint.open(path)], plan.to_json(), "test")


def changed_source(folder: Path) -> None:
    planned = job(mixture(folder), 1)
    extra(folder / "source", "m.safetensors")
    planned.run(folder / "out")


def busy(folder: Path) -> None:
    (folder / ".out.moses-surgery").mkdir()
    held = os.open(folder / ".out.moses-surgery", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        job(mixture(folder), 1).run(folder / "out")
    finally:
        os.close(held)


def strange(folder: Path) -> Path:
    """A gate with a tensor that no layout has."""
    path = mixture(folder)
    stray = "model.layers.0.block_sparse_moe.gate.b"
    raw = (path / "m.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b"norm.weight", stray.encode())
    (path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    names = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    return index(path, {stray if name == "norm.weight" else name: shard for name, shard in names.items()})


CASES: dict[str, Callable[[Path], object]] = {
    "dispatch_arguments": lambda _: plan([0, 1], 3),
    "expert_id_range": lambda _: plan([0, 2], 1),
    "out_of_memory": lambda _: _core.Block(1 << 62),
    "plan_index": lambda _: rows(1),
    "limit_exceeded": lambda _: Mask.empty(2**28 + 1),
    "mask_index": lambda _: Mask.from_indices(4, [4]),
    "mask_lengths_differ": lambda _: Mask.empty(4) | Mask.empty(5),
    "mask_shrinks": lambda _: Mask.empty(4).resized(3),
    "layer_unknown": lambda _: registry().used(7, "components"),
    "space_unknown": lambda _: registry().used(0, "A"),
    "task_unknown": lambda _: registry().new_bytes(9),
    "task_name_unknown": lambda _: registry().task("nine"),
    "layer_name_taken": lambda _: registry().add_layer("layer", 1, [("A", 1, 1)]),
    "task_name_taken": lambda _: closed_tasks().begin_task("one"),
    "space_name_taken": lambda _: registry().add_layer("x", 1, [("A", 1, 1), ("A", 1, 1)]),
    "name_invalid": lambda _: closed_tasks().begin_task("a\nb"),
    "zero_count": lambda _: registry().add_experts(0, 0),
    "task_open": lambda _: registry().begin_task("three"),
    "task_ended": lambda _: registry().abandon_task(0),
    "mask_given_twice": lambda _: registry().end_task(2, [(0, "components", Mask.empty(8))] * 2),
    "mask_misfit": lambda _: registry().end_task(2, [(0, "components", Mask.empty(7))]),
    "values_missing": lambda _: registry().assemble(1, {1: b"44"}),
    "values_misfit": lambda _: registry().assemble(0, {0: b"1"}),
    "hash_invalid": lambda _: registry().set_content_hash(0, "A" * 64),
    "name_given_twice": lambda _: hash_buffers([("a", b""), ("a", b"")]),
    "registry_inconsistent": lambda _: Registry.from_bytes(inconsistent()),
    "format_magic": lambda _: Registry.from_bytes(b"\x80\x05pickle" * 9),
    "format_version": lambda _: Registry.from_bytes(b"MOSESREG\x02\x00" + bytes(64)),
    "format_truncated": lambda _: Registry.from_bytes(b"MOSESREG\x01\x00"),
    "format_checksum": lambda _: Registry.from_bytes(b"MOSESREG\x01\x00" + bytes(64)),
    "format_malformed": lambda _: Registry.from_bytes(sealed(b"MOSESREG\x01\x00\x09" + bytes(8))),
    "format_oversized": lambda _: Registry.from_bytes(sealed(b"MOSESREG\x01\x00\x01" + b"\xff" * 8)),
    "safetensors_invalid": lambda folder: safetensors_header(shard(folder)),
    "manifest_invalid": lambda folder: Store.open(manifest(folder, generation=9)),
    "file_damaged": lambda folder: damaged(folder).read("a"),
    "not_a_run": lambda folder: Store.open(folder),
    "store_exists": lambda folder: Store.create(opened(folder) and folder / "run"),
    "store_locked": lambda folder: (store(folder), Store.open(folder / "run", write=True)),
    "store_closed": lambda folder: closed(folder).read("a"),
    "store_read_only": lambda folder: opened(folder).commit({"b": b""}),
    "store_changed": lambda folder: changed(folder).read("a"),
    "file_name_invalid": lambda folder: store(folder).commit({"../b": b""}),
    "file_unknown": lambda folder: store(folder).read("b"),
    "file_missing": lambda folder: missing(folder).read("a"),
    "path_taken": lambda folder: taken(folder).commit({"b": b""}),
    "checkpoint_invalid": lambda folder: _core.Checkpoint.open(mixture(folder, num_local_experts=3)),
    "shard_path": lambda folder: indexed(mixture(folder), lambda names: names.update(a="../m.safetensors")),
    "shard_missing": lambda folder: indexed(mixture(folder), lambda names: names.update(a="n.safetensors")),
    "shard_extra": lambda folder: _core.Checkpoint.open(extra(mixture(folder), "n.safetensors")),
    "tensor_missing": lambda folder: indexed(mixture(folder), lambda names: names.update(a="m.safetensors")),
    "tensor_unlisted": lambda folder: indexed(mixture(folder), lambda names: names.pop("norm.weight")),
    "weights_pickled": lambda folder: indexed(mixture(folder), lambda names: names.update(a="m.bin")),
    "experts_misfit": lambda folder: _core.Checkpoint.open(mixture(folder, gate=3)),
    "model_type_unknown": lambda folder: job(mixture(folder, model_type="other"), 1),
    "plan_misfit": lambda folder: _core.SurgeryJob.plan([_core.Checkpoint.open(mixture(folder))], "{}", "test"),
    "top_k_too_large": lambda folder: job(mixture(folder, num_experts_per_tok=2), 1),
    "tensor_unknown": lambda folder: _core.Checkpoint.open(strange(folder)),
    "surgery_unsupported": lambda folder: job(mixture(folder), layout="mxfp4"),
    "output_exists": lambda folder: job(mixture(folder), 1).run(folder / "source"),
    "output_inside": lambda folder: job(mixture(folder), 1).run(folder / "source" / "out"),
    "source_changed": changed_source,
    "surgery_busy": busy,
    "groups_misfit": lambda folder: deep(folder, [0]),
    "uneven_experts": lambda folder: deep(folder, [0, 1]),
}

# rust/moses-core/src/surgery/tests.rs gives these: a disk that is too small, and work that is stopped.
OF_A_DISK = {"no_space", "cancelled"}

# Only a disk that fails in the middle of a commit gives these: store/tests.rs and test_io_faults.py do.
OF_A_FAILING_DISK = {"commit_not_durable", "commit_unknown"}


def closed_tasks() -> Registry:
    made = registry()
    made.end_task(2, [])
    return made


def test_every_code_has_a_case() -> None:
    assert set(CASES) | OF_A_FAILING_DISK | OF_A_DISK == set(error_codes())


@pytest.mark.parametrize("code", sorted(CASES))
def test_code(code: str, tmp_path: Path) -> None:
    with pytest.raises(MosesError) as caught:
        CASES[code](tmp_path)
    error = caught.value
    assert error.code == code
    assert type(error).__name__ == error_codes()[code]
    message = str(error)
    assert "\n" not in message
    assert ": " in message or "; " in message, "what happened, then how to mend it"
    assert len(message) < 300 + len(str(tmp_path))


def test_the_tree() -> None:
    for name in TREE:
        error = getattr(moses.errors, name)("what happened\n  and where")
        assert isinstance(error, MosesError)
        assert str(error) == "what happened and where"
        assert error.code == name.removesuffix("Error").lower()
    assert sorted(moses.errors.__all__) == sorted([*TREE, "MosesError"])


def test_a_code_of_its_own_survives_pickling() -> None:
    error = moses.errors.ConfigError("no such method", code="unknown_method")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, str(again)) == (type(error), "unknown_method", "no such method")


def test_errors_and_the_core_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, moses.errors\nfrom moses._core import Mask\n"
        "try: Mask.from_indices(1, [1])\nexcept moses.errors.RegistryError as error: print(error.code)\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["mask_index", "[]"]


def test_the_stub_says_what_the_core_has(tmp_path: Path) -> None:
    pytest.importorskip("mypy.stubtest")
    # Not the project's settings: they would have mypy read torch too.
    settings = tmp_path / "mypy.ini"
    settings.write_text(f"[mypy]\nmypy_path = {Path(moses.errors.__file__).parents[1]}\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy.stubtest", "--mypy-config-file", str(settings), "moses._core"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
