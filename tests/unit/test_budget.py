"""Fixed capacity: the run's real bytes stay below the budget at every commit, and what tasks lose for it is said."""

from __future__ import annotations

import json

import pytest
import torch

from moses import _core, training
from moses.budget import identifier_features, parse_bytes
from moses.errors import ConfigError
from moses.evaluate import evaluate_run
from moses.methods.lora_rank import bytes_per_rank, energies, rank_of, truncated
from moses.progress import Progress
from moses.session import Session
from moses.verify import verify_path

SETTINGS = {
    "epochs": 1,
    "batch_size": 8,
    "eval_limit": 2,
    "learning_rate": 0.02,
    "max_length": 96,
    "max_new_tokens": 2,
    "eval_rows": "final",
    "identifier.num_features": 16,
}
WIDE = {"moses": {"density": 1.0, "growth": 1.0, "candidates": 32}, "per-task": {"rank": 8}}


def run(folder, out, method, budget=None, **more):
    settings = SETTINGS | WIDE.get(method, {}) | more.pop("settings", {})
    return training.train(
        str(folder),
        stream="tiny",
        method=method,
        output_dir=out,
        settings=settings,
        progress=Progress(quiet=True),
        budget=budget,
        **more,
    )


def real_bytes(path):
    """Bytes of the files that the manifest names and that tasks add, as the file system has them."""
    with _core.Store.open(path) as store:
        names = [name for name in store.files() if name.startswith(("tasks/", "identifier/", "registry"))]
        assert names
        return sum(len(store.read(name)) for name in names)


@pytest.fixture(params=["moses", "per-task"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def free(tiny_folder, tmp_path_factory):
    """Runs without a budget: results and bytes by the method."""
    found = {}
    for name in ("moses", "per-task"):
        out = tmp_path_factory.mktemp("free") / name
        found[name] = (run(tiny_folder, out, name).results, real_bytes(out))
    return found


def test_a_budget_that_bites_is_never_exceeded(tiny_folder, tmp_path, method, free, monkeypatch):
    limit = int(0.55 * free[method][1])
    seen = []
    commit = Session.commit_task

    def watched(session, *arguments):
        commit(session, *arguments)
        seen.append(real_bytes(session.path))

    monkeypatch.setattr(Session, "commit_task", watched)
    out = tmp_path / "run"
    results = run(tiny_folder, out, method, budget=str(limit)).results
    assert len(seen) == 3 and max(seen) <= limit and seen[-1] > 0.6 * limit
    budget = results["budget"]
    assert budget["limit"] == limit and budget["used"] == seen
    assert budget["given_up"], "nothing was given up, so nothing was tested"
    ended = {"living", "things", "action"}
    for entry in budget["given_up"]:
        assert entry["for"] in ended and all(0 <= share <= 1 for share in entry["lost"].values())
    assert verify_path(out).ok
    # what was evaluated in memory is what the folder holds
    again = evaluate_run(out, "til")
    assert again["til"]["row"] == results["til"]["matrix"][-1]


def test_an_interrupted_run_within_a_budget_ends_the_same(tiny_folder, tmp_path, method, free, monkeypatch):
    limit = int(0.55 * free[method][1])
    whole = run(tiny_folder, tmp_path / "whole", method, budget=limit).results
    commit = Session.commit_task

    def stop(session, *arguments):
        commit(session, *arguments)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(Session, "commit_task", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_folder, tmp_path / "run", method, budget=limit, resume=True)
    monkeypatch.setattr(Session, "commit_task", commit)
    results = run(tiny_folder, tmp_path / "run", method, budget=limit, resume=True).results
    assert results["budget"] == whole["budget"]
    assert results["til"] == whole["til"] and results["tail"] == whole["tail"]


def test_a_budget_that_is_not_reached_changes_nothing(tiny_folder, tmp_path, method, free):
    unlimited, _ = free[method]
    roomy = run(tiny_folder, tmp_path / "run", method, budget="100MB").results
    assert roomy["til"] == unlimited["til"] and roomy["tail"] == unlimited["tail"]
    assert roomy["budget"]["given_up"] == []


@pytest.mark.parametrize(
    ("method", "budget", "settings", "code"),
    [
        ("moses", 100, {}, "budget_too_small"),
        ("per-task", "1kB", {}, "budget_too_small"),
        ("moses", "2 parsecs", {}, "bad_budget"),
        ("moses", "1MB", {"granularity": "element"}, "no_budget"),
        ("per-task", "1MB", {"adapter": "ia3"}, "no_budget"),
        ("lifelong-moe", "1MB", {"train_trunk": True}, "no_budget"),
        ("sequential", "1MB", {}, "no_budget"),
    ],
)
def test_bad_budgets_are_refused_before_anything_is_written(tiny_folder, tmp_path, method, budget, settings, code):
    with pytest.raises(ConfigError) as error:
        training.train(
            str(tiny_folder),
            stream="tiny",
            method=method,
            output_dir=tmp_path / "run",
            settings=SETTINGS | settings,
            progress=Progress(quiet=True),
            budget=budget,
        )
    assert error.value.code == code
    assert not (tmp_path / "run").exists()


def test_sizes_are_read_as_they_are_written():
    assert [parse_bytes(text) for text in ("500kB", "2MB", "1.5 GiB", "7", 7, "1b")] == [
        500_000,
        2_000_000,
        1_610_612_736,
        7,
        7,
        1,
    ]
    for text in ("", "-1", "0", "kB", "2 TBs", "1e9", True, "nan"):
        with pytest.raises(ConfigError):
            parse_bytes(text)


def test_the_identifier_takes_a_third_of_the_budget_at_most():
    for budget in (20_000, 500_000, 2_000_000, 10**9):
        features = identifier_features(budget, 5)
        assert 16 <= features <= 690
        assert features == 16 or 5 * (features * (features - 1) + 16 * features) <= budget / 3


def test_a_lower_rank_is_the_nearest_map():
    torch.manual_seed(0)
    tensors = {"q.lora_A.weight": torch.randn(4, 6), "q.lora_B.weight": torch.randn(5, 4), "bias": torch.ones(2)}
    assert rank_of(tensors) == 4 and bytes_per_rank(tensors) == 44
    lower = truncated(tensors, 2)
    whole = tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"]
    found = lower["q.lora_B.weight"] @ lower["q.lora_A.weight"]
    energy = energies(tensors)
    assert lower["q.lora_A.weight"].shape == (2, 6) and lower["bias"] is tensors["bias"]
    torch.testing.assert_close((whole - found).square().sum().double(), energy[2:].sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energy, torch.linalg.svdvals(whole.double())[:4].square(), rtol=1e-4, atol=1e-4)


def test_a_narrowed_task_keeps_the_units_of_the_mask():
    registry = _core.Registry()
    layer = registry.add_layer("q", 2, [("components", 4, 8)])
    for name, units in (("a", [0, 1, 5]), ("b", [1, 2])):
        task = registry.begin_task(name)
        registry.end_task(task, [(layer, "components", _core.Mask.from_indices(8, units))])
    registry.narrow_task(0, [(layer, "components", _core.Mask.from_indices(8, [1, 3, 5]))])
    assert list(memoryview(registry.mask(0, layer, "components").to_indices()).cast("Q")) == [1, 5]
    assert registry.used_bytes() == 24 and registry.task("a").content_hash is None
    registry.validate()
    assert json.loads(json.dumps(registry.history())) == registry.history()
