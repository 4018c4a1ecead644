"""Files written by earlier versions stay readable, and the same content still gives the same bytes.

When a format changes on purpose, its version changes, and a new golden file joins the old ones:
`MOSES_WRITE_GOLDEN=1 pytest tests/golden` writes those that are missing, and never touches one that is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moses._core import Mask, Registry, Store

HERE = Path(__file__).parent
REGISTRY = HERE / "registry-v1.moses"
MASKS = HERE / "masks-v1.json"
RUN = HERE / "run-v1"

MASK_CASES: dict[str, Callable[[], Mask]] = {
    "empty": lambda: Mask.empty(100),
    "full": lambda: Mask.full(70_000),
    "bitmap": lambda: Mask.from_indices(32, [0, 5, 9, 17, 18, 22, 30]),
    "indices": lambda: Mask.from_indices(1_000_000, [7, 100_000, 700_000]),
    "runs": lambda: Mask.from_indices(1_000_000, [*range(1000, 5000), *range(90_000, 400_000)]),
    "roaring": lambda: Mask.from_bool(np.arange(300_000) % 3 == 0) | Mask.from_indices(300_000, range(65_536, 300_000)),
}

RUN_COMMITS: list[tuple[dict[str, bytes], list[str]]] = [
    ({"config.json": b'{"format_version": 1}\n', "registry.moses": b"first\n"}, []),
    ({"tasks/000-fomc/adapter.safetensors": b"weights\n", "registry.moses": b"second\n", "progress.json": b"[]\n"}, []),
    ({"registry.moses": b"third\n"}, ["progress.json"]),
]


def sample_registry() -> Registry:
    """One of everything: two granularities, growth, a forgotten, an abandoned, a hashed and an open task."""
    registry = Registry()
    rank = registry.add_layer("model.layers.0.self_attn.q_proj", 4, [("components", 8, 4608)])
    element = registry.add_layer("model.layers.0.mlp.up_proj", 2, [("A", 64, 4), ("B", 48, 4)])
    for number, name in enumerate(["c-stance", "fomc", "meetingbank"]):
        task = registry.begin_task(name, domain="news" if number else None)
        registry.end_task(
            task,
            [
                (rank, "components", Mask.from_indices(32, range(number, 32, 5))),
                (element, "A", Mask.from_indices(128, range(number * 20, number * 20 + 40))),
                (element, "B", Mask.full(96) if number == 2 else Mask.from_indices(96, [number, 50, 90])),
            ],
        )
    registry.add_experts(element, 1)
    registry.forget_task(0)
    registry.abandon_task(registry.begin_task("py150"))
    registry.set_content_hash(1, "0123456789abcdef" * 4)
    registry.begin_task("scienceqa")
    return registry


def write(path: Path, content: Callable[[], bytes]) -> None:
    if os.environ.get("MOSES_WRITE_GOLDEN") and not path.exists():
        path.write_bytes(content())


def make_run(folder: Path) -> None:
    with Store.create(folder) as store:
        for put, delete in RUN_COMMITS:
            store.commit(put, delete)
    (folder / ".lock").unlink()


def test_the_registry_of_version_1() -> None:
    write(REGISTRY, sample_registry().to_bytes)
    registry = Registry.from_bytes(REGISTRY.read_bytes())
    assert registry == sample_registry()
    assert registry.to_bytes() == REGISTRY.read_bytes()
    assert [(task.id, task.name, task.domain, task.state) for task in registry.tasks()] == [
        (1, "fomc", "news", "ended"),
        (2, "meetingbank", "news", "ended"),
        (4, "scienceqa", None, "open"),
    ]
    assert np.frombuffer(registry.mask(1, 0, "components").to_indices(), "<u8").tolist() == [1, 6, 11, 16, 21, 26, 31]
    assert registry.mask(2, 1, "B").count == 96
    assert registry.used_bytes() == 13 * 4608 + (60 + 96) * 4
    assert len(registry.history()) == 13


@pytest.mark.parametrize("name", MASK_CASES)
def test_masks_of_version_1(name: str) -> None:
    write(
        MASKS,
        lambda: (
            json.dumps({key: make().to_bytes().hex() for key, make in MASK_CASES.items()}, indent=1) + "\n"
        ).encode(),
    )
    data = bytes.fromhex(json.loads(MASKS.read_text())[name])
    assert Mask.from_bytes(data) == MASK_CASES[name]()
    assert MASK_CASES[name]().to_bytes() == data
    assert list(MASK_CASES).index(name) == data[2 if MASK_CASES[name]().length < 128 else 4], (
        "the tag is the encoding's"
    )


def test_the_run_folder_of_version_1(tmp_path: Path) -> None:
    if os.environ.get("MOSES_WRITE_GOLDEN") and not RUN.exists():
        make_run(RUN)
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    with Store.open(run) as store:
        assert (store.generation, store.verify()) == (3, [])
        assert {name: store.read(name) for name in store.files()} == {
            "config.json": b'{"format_version": 1}\n',
            "registry.moses": b"third\n",
            "tasks/000-fomc/adapter.safetensors": b"weights\n",
        }
    with Store.open(run, write=True) as store:
        assert store.commit({"registry.moses": b"fourth\n"}) == 4
    make_run(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_text() == (RUN / "manifest.json").read_text()
