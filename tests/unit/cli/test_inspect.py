"""What `inspect` says of runs and checkpoints is true, complete, and needs headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moses import _core
from moses.errors import FormatError, ModelError
from moses.inspect import inspect_path, open_run, task_bytes, task_of
from moses.run_files import CONFIG, REGISTRY


def test_a_run_as_json(run, cli, golden):
    code, out, err = cli("inspect", run, "--json")
    assert (code, err) == (0, "")
    golden("inspect_run.json", out.replace(str(run), "RUN"))


def test_a_run_as_text(run, cli, golden):
    code, out, err = cli("inspect", run)
    assert (code, err) == (0, "")
    golden("inspect_run.txt", "\n".join(line.rstrip() for line in out.replace(str(run), "RUN").splitlines()) + "\n")


def test_what_it_says_is_what_the_registry_and_the_files_say(run):
    document = inspect_path(run)
    emotion, topic, trec = document["tasks"]
    assert [emotion["units"], topic["units"], trec["units"]] == [3, 4, 3]
    # topic owns unit 2 of layer 0 and unit 3 of layer 1; trec's units are all owned by earlier tasks
    assert [task["new_weight_bytes"] for task in document["tasks"]] == [3 * 28, 2 * 28, 0]
    assert document["bank"]["used_bytes"] == 5 * 28
    assert document["bank"]["fraction"] == pytest.approx(5 / 8)
    assert document["overlap"] == [[84, 56, 28], [56, 112, 56], [28, 56, 84]]
    assert [layer["spaces"][0]["used"] for layer in document["layers"]] == [3, 2]


def test_the_bytes_of_a_task_are_those_of_its_files_and_masks(run):
    with open_run(run) as opened:
        for task in opened.registry.tasks():
            counts = task_bytes(opened, task.id)
            files = sum(Path(opened.store.path(name)).stat().st_size for name in opened.task_files(task.id))
            assert sum(counts.values()) == files + opened.registry.mask_bytes(task.id)
            assert counts["routers"] == 8 * 4
            assert counts["heads"] == 8 * 4


def test_an_open_task_has_no_units_yet(run):
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        registry.begin_task("later")
        store.commit({REGISTRY: registry.to_bytes()})
    later = inspect_path(run)["tasks"][-1]
    assert (later["name"], later["state"], later["units"], sum(later["bytes"].values())) == (
        "later",
        "open",
        0,
        later["bytes"]["masks"],
    )


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tasks/003-fomc/adapter.safetensors", 3),
        ("identifier/012-a-b.safetensors", 12),
        ("tasks/x-fomc/adapter.safetensors", None),
        ("tasks/²-fomc/adapter.safetensors", None),
        ("tasks/99999999999999999999-a/adapter.safetensors", None),
        ("config.json", None),
        ("other/003-fomc", None),
    ],
)
def test_files_of_a_task_are_known_by_their_names(name, task):
    assert task_of(name) == task


def test_a_checkpoint_of_two_shards(tmp_path, cli, golden, runs):
    folder = tmp_path / "model"
    folder.mkdir()
    for shard in range(2):
        tensors = {f"layers.{2 * shard + n}.up.weight": np.zeros((4, 3), "<f2") for n in range(2)}
        tensors |= {"bias": np.zeros((), "<f4")} if shard else {}
        (folder / f"model-{shard}.safetensors").write_bytes(runs.save(tensors))
    (folder / CONFIG).write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    code, out, _ = cli("inspect", folder)
    assert code == 0
    golden(
        "inspect_checkpoint.txt",
        "\n".join(line.rstrip() for line in out.replace(str(folder), "MODEL").splitlines()) + "\n",
    )
    document = inspect_path(folder)
    assert (document["num_tensors"], document["num_values"], document["bytes"]) == (5, 49, 4 * 24 + 4)
    assert document["bytes_by_dtype"] == {"F16": 96, "F32": 4}
    assert [tensor["file"] for tensor in document["tensors"] if tensor["name"] == "bias"] == ["model-1.safetensors"]


def test_one_file_is_a_checkpoint(tmp_path):
    save_file({"w": np.zeros(3, "<f4")}, tmp_path / "a.safetensors", {"format": "pt"})
    document = inspect_path(tmp_path / "a.safetensors")
    assert document["files"][0]["metadata"] == {"format": "pt"}
    assert document["tensors"] == [{"name": "w", "dtype": "F32", "shape": [3], "bytes": 12, "file": "a.safetensors"}]


def test_names_cannot_steer_the_terminal(tmp_path, cli):
    save_file({"\x1b[31mred\x07[bold]x": np.zeros(1, "<f4")}, tmp_path / "a.safetensors")
    code, out, _ = cli("inspect", tmp_path / "a.safetensors")
    assert code == 0
    assert "\x1b" not in out and "\x07" not in out
    assert "[bold]x" in out
    assert json.loads(cli("inspect", tmp_path / "a.safetensors", "--json")[1])["tensors"][0]["name"].startswith(
        "\x1b[31m"
    )


def test_what_is_neither_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="neither a run") as caught:
        inspect_path(tmp_path)
    assert caught.value.code == "nothing_to_read"
    with pytest.raises(FileNotFoundError):
        inspect_path(tmp_path / "absent")


def test_a_damaged_checkpoint_is_a_typed_error(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match=r"a\.safetensors"):
        inspect_path(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_damaged_model_config_is_a_typed_error(tmp_path, content):
    save_file({"w": np.zeros(1, "<f4")}, tmp_path / "a.safetensors")
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        inspect_path(tmp_path)


def test_a_run_without_a_registry_is_a_typed_error(tmp_path, runs):
    with _core.Store.create(tmp_path / "run") as store:
        store.commit({CONFIG: runs.config().to_bytes()})
    with pytest.raises(FormatError, match=REGISTRY) as caught:
        inspect_path(tmp_path / "run")
    assert caught.value.code == "run_incomplete"
