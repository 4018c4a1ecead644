"""Runs of the main job on a tiny model: forgetting is zero, an interruption changes nothing, and wrong input is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import moses
from moses import evaluate, training
from moses.checkpoint import forget_task
from moses.progress import Progress
from moses.session import Session
from moses.stream import load_stream
from moses.verify import verify_path

SETTINGS = {
    "epochs": 3,
    "batch_size": 4,
    "learning_rate": 0.02,
    "max_length": 96,
    "max_new_tokens": 3,
    "weight_decay": 0.1,
}


def run(folder, out, method="moses", **more):
    settings = SETTINGS | more.pop("settings", {})
    return training.train(
        str(folder),
        stream="tiny",
        method=method,
        output_dir=out,
        settings=settings,
        progress=Progress(quiet=True),
        **more,
    )


def measured(out):
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("environment", "seconds")}


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "moses"
    return out, run(tiny_folder, out)


def test_a_run_forgets_nothing_to_the_last_bit(finished):
    out, result = finished
    matrix = result.matrix
    assert len(matrix) == 3 and all(len(row) == 3 and None not in row for row in matrix)
    assert all(matrix[t][i] == matrix[i][i] for i in range(3) for t in range(i, 3))
    assert result.metrics["bwt"] == 0.0 and result.metrics["forgetting"] == 0.0
    results = measured(out)
    assert len(results["base"]) == 3 and len(results["capacity"]) == 3
    assert {"weights", "masks", "routers", "heads", "identifier"} == set(results["capacity"][0]["bytes"])
    assert results["capacity"][-1]["bytes"]["weights"] < results["capacity"][0]["bytes"]["weights"]
    assert results["tail"]["task_accuracy"] is not None and len(results["tail"]["confusion"][0]) == 4
    assert set(results["expert_use"]) == set(results["tasks"])
    assert all(abs(sum(shares) - 1) < 1e-9 for layers in results["expert_use"].values() for shares in layers.values())


def test_capacity_is_what_the_folder_holds_and_the_folder_is_enough(finished, tmp_path):
    out, result = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    for path in copy.iterdir():
        if path.name in ("results.json", "log.jsonl") or path.suffix in (".html", ".png"):
            path.unlink()
    counted = sum(sum(task["bytes"].values()) for task in result.results["capacity"])
    held = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file() and path.parent.name != "run")
    held += (
        (copy / "registry.moses").stat().st_size
        if (copy / "registry.moses").exists()
        else max(p.stat().st_size for p in copy.glob("registry*"))
    )
    assert abs(held - counted) <= 0.02 * counted
    code = (
        f"import json; from moses.evaluate import evaluate_run; print(json.dumps(evaluate_run({str(copy)!r}, 'til')))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    ).stdout
    assert json.loads(answer.splitlines()[-1])["til"]["row"] == result.matrix[-1]


@pytest.mark.parametrize("method", ["moses", "sequential", "per-task"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_classifiers_and_encoder_decoders_learn_a_stream(method, family, tiny_model, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    model = tiny_model(family, vocab_size=600, positions=128)
    settings = SETTINGS | {"epochs": 2, "eval_limit": 4}
    out = tmp_path / "run"
    result = training.train(
        model,
        AutoTokenizer.from_pretrained(tiny_folder),
        stream=load_stream("tiny"),
        method=method,
        output_dir=out,
        settings=settings,
        progress=Progress(quiet=True),
    )
    heads = [task["bytes"]["heads"] for task in result.results["capacity"]]
    if family == "bert":
        assert all(result.matrix[t][i] is None for t in range(3) for i in range(t + 1, 3))
        assert min(heads) > 0 and result.metrics["fwt"] is None and result.results["base"] == [None] * 3
    else:
        assert all(None not in row for row in result.matrix) and max(heads) == 0
    if method != "sequential":
        assert result.metrics["bwt"] == 0.0
    with pytest.raises(moses.MosesError, match="in memory"):
        moses.load(out)
    loaded = moses.load(out, tiny_model(family, vocab_size=600, positions=128))
    assert not loaded.training
    last = result.results["tasks"][-1]
    if method == "sequential":  # one LoRA learned from all of them
        with pytest.raises(moses.MosesError, match="one set of weights"):
            forget_task(out, last)
    else:
        forget_task(out, last)
        assert verify_path(out).ok


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        *itertools.product(
            ["moses", "sequential", "per-task"], ["in training", "before commit", "after commit", "before row"]
        ),
        ("moses-adapter", "in training"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_results(method, stop, tiny_folder, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    small = {"epochs": 1, "eval_limit": 3, "eval_modes": ["til"] if stop != "before row" else ["til", "tail"]}
    if method == "moses-adapter":
        method, small = "moses", small | {"ffn_experts": "adapter"}
    run(tiny_folder, whole, method, settings=small)
    interrupt(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, part, method, settings=small)
    monkeypatch.undo()
    run(tiny_folder, part, method, settings=small, resume=True)
    assert measured(part) == measured(whole)
    assert verify_path(part, whole).problems == []


def interrupt(monkeypatch, stop):
    """Raise KeyboardInterrupt at one point of the second task."""
    calls = {"count": 0}
    commit, row = Session.commit_task, Session.evaluate_row

    def commit_then(self, *args):
        calls["count"] += 1
        if calls["count"] == 2 and stop == "before commit":
            raise KeyboardInterrupt
        commit(self, *args)
        if calls["count"] == 2 and stop == "after commit":
            raise KeyboardInterrupt

    def row_then(self, trained):
        if len(trained) == 2 and stop == "before row":
            raise KeyboardInterrupt
        row(self, trained)

    if stop == "in training":
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                calls["count"] += 1
                if calls["count"] == 6:
                    raise KeyboardInterrupt

        log = Session.log_callback
        stopper = Stop()
        monkeypatch.setattr(Session, "log_callback", lambda self, task: _both(log(self, task), stopper))
    monkeypatch.setattr(Session, "commit_task", commit_then)
    monkeypatch.setattr(Session, "evaluate_row", row_then)


def _both(first, second):
    from transformers import TrainerCallback

    class Both(TrainerCallback):
        def on_log(self, *args, **kwargs):
            first.on_log(*args, **kwargs)

        def on_step_end(self, *args, **kwargs):
            second.on_step_end(*args, **kwargs)

    return Both()


def test_resume_starts_an_absent_run_and_ends_a_finished_one_at_once(finished, tiny_folder, tmp_path, monkeypatch):
    out, result = finished
    monkeypatch.setattr(training, "_run", lambda session: pytest.fail("a finished run was run again"))
    assert run(tiny_folder, out, resume=True).matrix == result.matrix
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    small = {"epochs": 1, "eval_limit": 1, "eval_modes": ["til"]}
    assert run(tiny_folder, tmp_path / "empty", resume=True, settings=small, tasks=None).matrix


def test_what_does_not_fit_is_refused_with_a_code(finished, tiny_folder, tmp_path):
    out, _ = finished
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("not a run")
    cases = [
        ("run_exists", {"out": out}),
        ("not_a_run", {"out": tmp_path / "full", "resume": True}),
        ("run_differs", {"out": out, "resume": True, "settings": {"epochs": 7}}),
        ("run_differs", {"out": out, "resume": True, "seed": 1}),
        ("run_differs", {"out": out, "resume": True, "method": "per-task"}),
        ("unknown_method", {"out": tmp_path / "new", "method": "magic"}),
        ("unknown_setting", {"out": tmp_path / "new", "settings": {"epocs": 7}}),
        ("bad_setting", {"out": tmp_path / "new", "settings": {"epochs": 0}}),
        ("unknown_module", {"out": tmp_path / "new", "settings": {"target_modules": ["q_porj"]}}),
    ]
    for code, arguments in cases:
        with pytest.raises(moses.MosesError) as caught:
            run(tiny_folder, arguments.pop("out"), **arguments)
        assert caught.value.code == code, caught.value
    assert not (tmp_path / "new").exists()


def test_each_prompt_of_a_mixed_batch_gets_its_own_task(finished, tiny_folder):
    out, _ = finished
    from transformers import AutoTokenizer

    model, tokenizer = moses.load(out), AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.padding_side = "left"
    prompts = [
        row.prompt for rows in zip(*(task.test for task in load_stream("tiny").tasks), strict=False) for row in rows
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    found = model.identify(**batch)
    taken = [None if unknown else int(task) for task, unknown in zip(found.task_ids, found.unknown, strict=True)]
    assert len(set(taken) - {None}) >= 2, "the batch is not mixed"
    names = {info.id: info.name for info in model.registry.tasks()}
    with model.task(None), torch.no_grad():
        mixed = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
        logits = model(**batch).logits
    for task in sorted(set(taken), key=str):
        rows = [row for row, other in enumerate(taken) if other == task]
        part = {key: value[rows] for key, value in batch.items()}
        with model.base() if task is None else model.task(names[task]), torch.no_grad():
            assert torch.equal(mixed[rows], model.generate(**part, max_new_tokens=3, do_sample=False)[:, -3:])
            torch.testing.assert_close(logits[rows], model(**part).logits, rtol=1e-4, atol=1e-4)


def test_evaluating_a_run_again_gives_its_last_row(finished):
    out, result = finished
    again = evaluate.evaluate_run(out, "both")
    assert again["til"]["row"] == result.matrix[-1]
    assert again["tail"]["row"] == result.results["tail"]["matrix"][-1]


def test_generate_says_which_task_it_took_the_prompt_for(finished):
    from moses.generate import answer

    out, _ = finished
    task = load_stream("tiny").tasks[1]
    given = answer(out, task.name, task.test[0].prompt)
    assert given["task"] == task.name and given["task_probability"] is None
    inferred = answer(out, "auto", task.train[0].prompt)
    assert inferred["task"] == task.name and 0 < inferred["task_probability"] <= 1
    with pytest.raises(moses.MosesError, match="no trained task"):
        answer(out, "nonsense", "x")


@pytest.mark.skipif("MOSES_PROVE" not in os.environ, reason="starts four processes of torch; part of `make prove`")
def test_two_processes_of_torchrun_make_one_run(tiny_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "moses",
        "train",
    ]
    command += ["--model", str(tiny_folder), "--stream", "tiny", "--method", "moses", "--out", str(tmp_path / "run")]
    for setting in ("epochs=1", "max_length=96", "max_new_tokens=3", "eval_limit=3"):
        command += ["--set", setting]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["til"]["metrics"]["bwt"] == 0.0
    assert len(moses.load(tmp_path / "run").registry.tasks()) == 3
