"""A process that is killed in the middle of surgery leaves the old state or the new; every single operation is stopped at in Rust's own tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moses import surgery

POINTS = 200 if os.environ.get("MOSES_PROVE") else 6
ROWS = 1 << 12


def checkpoint(folder: Path) -> Path:
    """A Mixtral of one layer and eight experts, 50 MB in four shards, of holes and a few bytes."""
    folder.mkdir()
    block = "model.layers.0.block_sparse_moe"
    weight_map = {}
    for number in range(4):
        names = {f"{block}.experts.{2 * number + n}.w{w}.weight": (ROWS, 256) for n in (0, 1) for w in (1, 2, 3)}
        if number == 0:
            names[f"{block}.gate.weight"] = (8, 256)
        header, end = {}, 0
        for name, (rows, columns) in names.items():
            header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
            end += 2 * rows * columns
            weight_map[name] = f"model-{number + 1:05}-of-00004.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{number + 1:05}-of-00004.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + bytes([number + 1]) * 4096)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def killed(code: str, temporary: Path, at: float, total: int) -> None:
    """Run `code` and kill it once the share `at` of `total` bytes is written."""
    process = subprocess.Popen([sys.executable, "-c", f"from moses import surgery\n{code}"])
    while process.poll() is None:
        try:
            with os.scandir(temporary) as entries:
                written = sum(entry.stat().st_size for entry in entries)
        except OSError:
            continue
        if written >= at * total:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kill_leaves_the_old_or_the_new(in_place, tmp_path):
    source = checkpoint(tmp_path / "source")
    out = source if in_place else tmp_path / "out"
    arguments = (
        "add=1, noise=0.1, writing=surgery.Writing(in_place=True)" if in_place else f"{str(out)!r}, add=1, noise=0.1"
    )
    plan = surgery.grow(source, add=1, noise=0.1, writing=surgery.Writing(dry_run=True)).plan
    total = 6_000_000 if in_place else 56_000_000
    before = {path.name for path in source.iterdir()}
    for point in range(POINTS):
        killed(
            f"surgery.grow({str(source)!r}, {arguments})",
            tmp_path / f".{out.name}.moses-surgery",
            point / POINTS,
            total,
        )
        if in_place:
            count = surgery.open_checkpoint(source).facts.num_experts["model.layers.0"]
            if count == 8:
                assert {path.name for path in source.iterdir()} == before
                continue
            before = {path.name for path in source.iterdir()}
            break
        if out.exists():
            assert surgery.verify(out, source, plan).ok
            break
    if not in_place and not out.exists():
        surgery.grow(source, out, add=1, noise=0.1)
        assert surgery.verify(out, source).ok
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "out", f".{out.name}.moses-surgery"}
