"""`verify` passes what is whole and finds every mistake that is made here on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save, save_file

from moses import _core
from moses.errors import MosesError, StoreError
from moses.run_files import CONFIG, REGISTRY, adapter_file
from moses.verify import verify_path


def codes(verdict) -> list[str]:
    return sorted({problem.code for problem in verdict.problems})


def rewrite(run: Path, name: str, change) -> None:
    """Change the tensors of a task's file by a proper commit, so that every file's hash is right."""
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        file = adapter_file(registry.task(name))
        tensors = {key: value.copy() for key, value in load(store.read(file)).items()}
        change(tensors)
        store.commit({file: save(tensors)})


def with_registry(run: Path, change) -> None:
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        change(registry)
        store.commit({REGISTRY: registry.to_bytes()})


@pytest.fixture
def old(run: Path) -> Path:
    return Path(shutil.copytree(run, run.parent / "old"))


def test_a_whole_run_passes(run, cli):
    verdict = verify_path(run)
    assert verdict.ok and not verdict.notes
    assert [task["name"] for task in verdict.tasks] == ["emotion", "topic", "trec"]
    assert all(len(task["content_hash"]) == 64 for task in verdict.tasks)
    assert cli("verify", run)[0] == 0


def test_every_byte_of_every_file_counts(run):
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "log.jsonl")):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[at] ^= 0x20
            path.write_bytes(damaged)
            verdict = verify_path(run)
            # an upper case letter in a task's name is still a text
            if path.name != "results.json" and not (path.name == "manifest.json" and at == len(whole) - 1):
                assert not verdict.ok, (path, at)
        path.write_bytes(whole)
    assert verify_path(run).ok


def test_weights_that_changed_under_a_right_hash_are_found(run, cli, golden):
    def change(tensors):
        tensors["weights"][0] += 1

    rewrite(run, "topic", change)
    verdict = verify_path(run)
    assert codes(verdict) == ["content_hash_differs"]
    # trec uses what topic owns
    assert [problem.problem.split()[2] for problem in verdict.problems] == ["(topic):", "(trec):"]
    code, out, err = cli("verify", run, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["ok"] is False
    code, out, _ = cli("verify", run)
    golden("cli_verify_changed.txt", out.replace(str(run), "RUN"))


def test_weights_of_the_wrong_size_are_found(run):
    rewrite(run, "topic", lambda tensors: tensors.update(weights=tensors["weights"][:-1]))
    assert codes(verify_path(run)) == ["values_misfit"]


def test_a_missing_file_is_found(run):
    next(run.glob("tasks/001-*/adapter.safetensors")).unlink()
    assert "file_missing" in codes(verify_path(run))


def test_an_adapter_that_a_commit_left_out_is_found(run):
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        store.commit({}, [adapter_file(registry.task("topic"))])
    assert codes(verify_path(run)) == ["adapter_missing", "values_missing"]


def test_an_adapter_without_weights_is_found(run):
    rewrite(run, "trec", lambda tensors: tensors.pop("weights"))
    assert codes(verify_path(run)) == ["weights_missing"]


def test_a_task_without_a_content_hash_is_found(run, runs):
    def change(registry):
        task = registry.begin_task("unhashed")
        registry.end_task(task, [])

    with_registry(run, change)
    assert codes(verify_path(run)) == ["adapter_missing"]
    with _core.Store.open(run, write=True) as store:
        info = _core.Registry.from_bytes(store.read(REGISTRY)).task("unhashed")
        store.commit({adapter_file(info): save({"weights": np.zeros(0, "<f4")})})
    assert codes(verify_path(run)) == ["content_hash_missing"]


def test_files_of_no_task_and_files_of_nobody_are_found(run):
    with _core.Store.open(run, write=True) as store:
        store.commit({"tasks/009-ghost/adapter.safetensors": save({"weights": np.zeros(1, "<f4")})})
    assert codes(verify_path(run)) == ["orphan_file"]
    (run / "tasks" / "notes.txt").write_text("mine")
    verdict = verify_path(run)
    assert codes(verdict) == ["orphan_file", "unexpected_file"]
    assert any(problem.file == str(run / "tasks" / "notes.txt") for problem in verdict.problems)


@pytest.mark.parametrize("folder", [False, True])
def test_links_are_found_and_not_followed(run, tmp_path, folder):
    target = tmp_path / "target"
    target.mkdir()
    (target / "inner.txt").write_text("x")
    (run / "extra").symlink_to(target if folder else target / "inner.txt")
    verdict = verify_path(run)
    assert codes(verdict) == ["link"]
    assert len(verdict.problems) == 1


def test_the_trainers_folder_and_reports_belong_to_a_run(run):
    (run / "trainer" / "checkpoint-1").mkdir(parents=True)
    (run / "trainer" / "checkpoint-1" / "optimizer.pt").write_text("x")
    (run / "report.html").write_text("x")
    (run / "til-matrix.png").write_text("x")
    assert verify_path(run).ok


def test_what_an_interrupted_commit_left_is_a_note(run):
    (run / "tasks" / "003-next").mkdir()
    (run / "tasks" / "003-next" / "adapter.safetensors").write_bytes(b"half")
    assert codes(verify_path(run)) == ["unexpected_file"]
    (run / ".pending").write_text('{"generation": 9, "paths": ["tasks/003-next/adapter.safetensors"]}')
    verdict = verify_path(run)
    assert verdict.ok and len(verdict.notes) == 1


@pytest.mark.parametrize("name", [REGISTRY, CONFIG])
def test_a_damaged_registry_or_config_is_a_problem_and_not_a_crash(run, name):
    (run / name).write_bytes(b"x" * 10)
    with _core.Store.open(run) as store:
        path = Path(store.path(name))
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    verdict = verify_path(run, against=None)
    assert "file_damaged" in codes(verdict)
    assert any(name in problem.file for problem in verdict.problems)


def test_a_damaged_manifest_is_a_problem(run, cli):
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"generation": 4', '"generation": 5'))
    verdict = verify_path(run)
    assert codes(verdict) == ["manifest_invalid"]
    assert cli("verify", run)[0] == 1


def test_damaged_results_are_a_problem(run):
    (run / "results.json").write_text('{"tasks": []}')
    assert codes(verify_path(run)) == ["results_damaged"]


def test_what_is_no_run_is_wrong_usage(tmp_path, run, cli):
    assert cli("verify", tmp_path / "absent")[0] == 2
    assert cli("verify", run, "--against", tmp_path)[0] == 2
    assert cli("verify", tmp_path, "--against", run)[0] == 2
    with pytest.raises(StoreError):
        verify_path(run, tmp_path)


# -- frozen bits -------------------------------------------------------------------------------------------------------


def test_a_run_is_identical_to_its_copy(run, old, cli):
    verdict = verify_path(run, old)
    assert verdict.ok
    assert [task["identical"] for task in verdict.tasks] == [True] * 3
    code, out, _ = cli("verify", run, "--against", old)
    assert code == 0 and f"3 of 3 tasks are bit-identical to {old}" in out


def test_a_later_task_leaves_the_earlier_ones_identical(tmp_path, runs):
    run, old = runs.build(tmp_path / "run"), runs.build(tmp_path / "old", runs.tasks[:2])
    verdict = verify_path(run, old)
    assert verdict.ok
    assert [task.get("identical") for task in verdict.tasks] == [True, True, None]


@pytest.mark.parametrize("tensor", ["router", "head.weight"])
def test_a_changed_bit_of_a_router_or_head_is_found(run, old, tensor):
    def change(tensors):
        tensors[tensor].view(np.uint32).flat[3] ^= 1

    rewrite(run, "topic", change)
    assert verify_path(run).ok
    verdict = verify_path(run, old)
    assert codes(verdict) == ["frozen_bits_changed"]
    assert f"{tensor} changed" in verdict.problems[0].problem
    assert [task["identical"] for task in verdict.tasks] == [True, False, True]


def test_a_router_that_is_gone_is_found(run, old):
    rewrite(run, "topic", lambda tensors: tensors.pop("router"))
    assert codes(verify_path(run, old)) == ["frozen_bits_changed"]


def test_weights_that_changed_with_their_noted_hash_are_found(run, old):
    """Someone who changes weights and notes the new hash too is caught by the older copy."""

    def change(tensors):
        tensors["weights"][0] += 1

    rewrite(run, "emotion", change)
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        owned = {info.id: load(store.read(adapter_file(info)))["weights"].tobytes() for info in registry.tasks()}
        for info in registry.tasks():
            registry.set_content_hash(info.id, registry.content_hash(info.id, owned))
        store.commit({REGISTRY: registry.to_bytes()})
    assert verify_path(run).ok
    verdict = verify_path(run, old)
    assert codes(verdict) == ["frozen_bits_changed"]
    # unit 0 of layer 0 is emotion's, and trec uses it
    assert [task["identical"] for task in verdict.tasks] == [False, True, False]


def test_an_unreadable_task_is_never_called_identical(run, old):
    for folder in (run, old):
        rewrite(folder, "emotion", lambda tensors: tensors.pop("weights"))
    verdict = verify_path(run, old)
    assert [task["identical"] for task in verdict.tasks] == [False] * 3


def test_a_mask_that_changed_is_found(tmp_path, runs, run, old):
    """The same weights in the same order, selected at other places: only the mask tells."""
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry()
        for layer in range(2):
            registry.add_layer(f"model.layers.{layer}.mlp.up_proj", 2, [("components", 2, 28)])
        mask = _core.Mask.from_indices
        values = {}
        for name, units in {"emotion": ([0, 3], [2]), "topic": ([1, 2], [2, 3]), "trec": ([0, 2], [3])}.items():
            task = registry.begin_task(name)
            registry.end_task(task, [(layer, "components", mask(4, chosen)) for layer, chosen in enumerate(units)])
        for info in registry.tasks():
            values[info.id] = np.zeros(registry.new_bytes(info.id) // 4, "<f4")
        put = {}
        for info in registry.tasks():
            registry.set_content_hash(
                info.id, registry.content_hash(info.id, {key: value.tobytes() for key, value in values.items()})
            )
            put[adapter_file(info)] = save(runs.task_tensors(registry, info.id) | {"weights": values[info.id]})
        store.commit(put | {REGISTRY: registry.to_bytes()})
    verdict = verify_path(run, old)
    changed = {problem.problem.split("(")[1].split(")")[0]: problem.problem for problem in verdict.problems}
    assert "mask of model.layers.0.mlp.up_proj (components)" in changed["emotion"]
    assert "mask of" not in changed["trec"]


def test_a_bank_that_grew_leaves_tasks_identical(run, old):
    with_registry(run, lambda registry: registry.add_experts(0, 2))
    verdict = verify_path(run, old)
    assert verdict.ok and all(task["identical"] for task in verdict.tasks)


def test_a_task_forgotten_on_purpose_is_a_note_and_others_stay_identical(run, old, runs):
    with _core.Store.open(run, write=True) as store:
        registry = _core.Registry.from_bytes(store.read(REGISTRY))
        gone = registry.task("emotion")
        registry.forget_task(gone.id)
        put = {adapter_file(info): save(runs.task_tensors(registry, info.id)) for info in registry.tasks()}
        stale = [name for name in store.files() if "/000-" in name]
        store.commit(put | {REGISTRY: registry.to_bytes()}, stale)
    verdict = verify_path(run, old)
    assert verdict.ok, verdict.problems
    assert verdict.notes == ["task 0 (emotion) was forgotten since"]
    assert [task["identical"] for task in verdict.tasks] == [True, True]


def test_a_task_that_is_simply_gone_is_found(tmp_path, runs):
    run, old = runs.build(tmp_path / "run", runs.tasks[:2]), runs.build(tmp_path / "old")
    verdict = verify_path(run, old)
    assert codes(verdict) == ["task_lost"]


def test_another_base_model_is_found(run, old, runs):
    model = runs.config().model
    other = type(model)(model.source, model.kind, model.model_type, model.dtype, "e" * 64)
    with _core.Store.open(run, write=True) as store:
        store.commit({CONFIG: runs.config(model=other).to_bytes()})
    assert codes(verify_path(run, old)) == ["model_differs"]


def test_damage_of_the_older_copy_is_told_as_its_own(run, old):
    def change(tensors):
        tensors["weights"][0] += 1

    rewrite(old, "topic", change)
    verdict = verify_path(run, old)
    assert all(
        problem.file.startswith(str(old)) for problem in verdict.problems if problem.code == "content_hash_differs"
    )
    assert not verdict.ok


def test_a_method_without_a_bank_is_compared_by_its_tensors(tmp_path, runs):
    for name in ("run", "old"):
        registry = _core.Registry()
        registry.end_task(registry.begin_task("emotion"), [])
        with _core.Store.create(tmp_path / name) as store:
            put = {CONFIG: runs.config(method="per-task").to_bytes(), REGISTRY: registry.to_bytes()}
            put[adapter_file(registry.task("emotion"))] = save({"lora_A": np.zeros(4, "<f4")})
            store.commit(put)
    assert verify_path(tmp_path / "run", tmp_path / "old").ok
    rewrite(tmp_path / "run", "emotion", lambda tensors: tensors["lora_A"].fill(1))
    assert verify_path(tmp_path / "run").ok
    assert codes(verify_path(tmp_path / "run", tmp_path / "old")) == ["frozen_bits_changed"]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_its_index(tmp_path, cli):
    save_file({"a": np.zeros(2, "<f4")}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(2, "<f4")}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert verify_path(tmp_path).ok
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors", "d": ["x"]}}))
    assert codes(verify_path(tmp_path)) == ["tensor_missing", "tensor_unlisted"]
    index.write_text("[]")
    assert codes(verify_path(tmp_path)) == ["json_damaged"]
    index.write_text('{"weight_map": []}')
    assert codes(verify_path(tmp_path)) == ["index_damaged"]
    index.unlink()
    (tmp_path / "model-2.safetensors").write_bytes(b"x")
    assert codes(verify_path(tmp_path)) == ["safetensors_invalid"]
    assert cli("verify", tmp_path)[0] == 1


def test_a_folder_without_anything_is_wrong_usage(tmp_path, cli):
    with pytest.raises(MosesError, match="neither"):
        verify_path(tmp_path)
    assert cli("verify", tmp_path)[0] == 2
