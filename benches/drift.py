"""Five text domains with hidden boundaries, one of which returns: what the drift detector finds, and what that costs in perplexity.

    python benches/drift.py detect [--model smollm2-135m-instruct] [--seeds 200-209] [--test page-hinkley]
    python benches/drift.py learn  [--model smollm2-135m-instruct] [--method moses] [--seed 200]

`detect` draws, for each seed, five of the six domains of the stream `domains`, their order, their passages and which of the first four
returns, and runs the detector on the base model's features of the first 64 tokens of each passage (novelty alone: nothing is trained, so
the loss stays out). Settings and rules were chosen on seeds 0 to 5 and 100 to 109; report others. `learn` trains one such stream twice,
with its boundaries hidden and given, at one epoch, and scores every domain's test passages, with the domain given and inferred. `--model
small` is a model that this script trains first (two cores need hours for SmolLM2). A row that is in benches/results/drift.json already is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "drift.json"
WORK = HERE.parent / "build" / "drift"
TOKENS, FIRST, SHORT, RETURN = (
    64,
    90,
    110,
    60,
)  # sequences of the returning domain's first visit, of other visits, of its second
CHARACTERS = 240
LEARNING: dict[str, Any] = {
    "dtype": "bfloat16",
    "epochs": 1,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "max_length": 64,
    "eval_batch_size": 8,
}


def drawn(seed: int, names: list[str]) -> tuple[list[str], str]:
    """Five domains in order, and the one that returns."""
    random = np.random.RandomState(seed)
    order = [str(name) for name in random.permutation(names)[:5]]
    return order, order[random.randint(4)]


def features(model_name: str) -> dict[str, Any]:
    """(passages, 2, D) of each domain's training passages, cached."""
    from moses.models import load_model
    from moses.stream import load_stream
    from moses.stream.identify import features_of_encoded

    path = WORK / f"{model_name}-{TOKENS}.npz"
    found = dict(np.load(path)) if path.exists() else {}
    tasks = [task for task in load_stream("domains").tasks if task.name not in found]
    if tasks:
        model, tokenizer, _ = load_model(model_name, "float32")
        WORK.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            rows = [tokenizer(row.shown)["input_ids"][:TOKENS] for row in task.train]
            found[task.name] = features_of_encoded(model, rows).numpy()
            np.savez(path, **found)
    return found


def detect(model_name: str, seed: int, test: str) -> dict[str, Any]:
    from moses.stream.drift import DriftConfig, DriftDetector, recognise, score_changes
    from moses.stream.identify import IdentifierConfig, TaskIdentifier

    found = features(model_name)
    order, returning = drawn(seed, list(found))
    random = np.random.RandomState(1000 + seed)
    shuffled = {name: found[name][random.permutation(len(found[name]))] for name in order}
    visits = [(name, shuffled[name][: FIRST if name == returning else SHORT]) for name in order]
    visits.append((returning, shuffled[returning][FIRST : FIRST + RETURN]))
    x = np.concatenate([rows for _, rows in visits])
    config = DriftConfig(test=test)  # type: ignore[arg-type]
    identifier = TaskIdentifier(IdentifierConfig(), x.shape[2])
    alarms: list[int] = []
    segments: list[tuple[int, str]] = []
    dismissed, start = 0, 0
    while start < len(x):
        known = recognise(identifier, x[start : start + config.opening], config)
        task = len(identifier.task_ids) if known is None else known
        segments.append((start, str(task)))
        detector, stop = DriftDetector(config), len(x)
        for place in range(start, len(x)):
            if not detector.update(x[place]):
                continue
            change = start + (detector.change or 0)
            trial = TaskIdentifier(identifier.config, x.shape[2])
            for other in identifier.task_ids:
                trial.load_task_state(other, identifier.task_state(other))
            if known is None:
                trial.add_task(task, x[start:change])
            if recognise(trial, x[change : change + config.opening], config) == task:
                dismissed += 1
                detector.dismiss()
                continue
            alarms.append(place + 1)
            stop = change
            break
        if known is None:
            identifier.add_task(task, x[start:stop])
        start = stop
    score = score_changes([(name, len(rows)) for name, rows in visits], alarms, segments)
    return {"order": order, "returning": returning, "dismissed": dismissed, **score.to_json()}


def small_model() -> tuple[Any, Any]:
    """A Llama of 3 blocks, width 192, trained here on English and a little of every other domain, as a pretrained model has seen it."""
    from moses import training
    from moses.growth.folder import save_model
    from moses.models import load_model
    from moses.scratch import make_model, make_tokenizer
    from moses.stream import load_stream
    from moses.stream.task import Stream, Task

    folder = WORK / "small"
    if not folder.exists():
        tasks = load_stream("domains", num_train=400).tasks
        rows = [row for task in tasks for row in (task.train if task.name == "english" else task.train[150:170])]
        rows += [row for task in tasks for row in task.eval if task.name != "english"]
        tokenizer = make_tokenizer([row.answer for task in tasks for row in task.train], 4096)
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
        more = {"num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True}
        torch_model = make_model({"model_type": "llama", **sizes, **more}, tokenizer)
        run = training.train(
            torch_model,
            tokenizer,
            Stream("base", (Task("base", tuple(rows), (), tasks[0].test[:8], tasks[0].metric),)),
            method="finetune",
            output_dir=WORK / "small-run",
            settings={"epochs": 4, "batch_size": 16, "learning_rate": 2e-3, "max_length": 128, "eval_modes": ["til"]},
        )
        save_model(run.model, folder, tokenizer)
    model, tokenizer, _ = load_model(str(folder))
    return model, tokenizer


def learn(model_name: str, method: str, seed: int, boundaries: str) -> dict[str, Any]:
    from moses import training
    from moses.stream import load_stream
    from moses.stream.task import Stream, Task, text_example

    whole = {task.name: task for task in load_stream("domains").tasks}
    order, returning = drawn(seed, list(whole))

    def cut(rows: Any, count: int) -> Any:
        return tuple(dict.fromkeys(text_example(row.answer[:CHARACTERS].strip()) for row in rows[:count]))

    tasks = []
    for name in order:
        task = whole[name]
        count = 120 if name == returning else 60
        tasks.append(Task(name, cut(task.train, count), (), cut(task.test, 16), task.metric, name))
    out = WORK / f"{method}-{seed}-{boundaries}"
    shutil.rmtree(out, ignore_errors=True)
    from moses.models import load_model

    settings = dict(LEARNING)
    dtype = settings.pop("dtype")
    model, tokenizer = small_model() if model_name == "small" else load_model(model_name, dtype)[:2]
    settings |= {"eval_rows": "final"} if boundaries == "given" else {"horizon": 64}
    visits = [*order, returning] if boundaries == "none" else None
    seconds = time.monotonic()
    run = training.train(
        model,
        tokenizer,
        Stream("visits", tuple(tasks)),
        method=method,
        output_dir=out,
        tasks=visits,
        settings=settings,
        boundaries=boundaries,
    )
    results = run.results
    row = {"order": order, "returning": returning, "base": results["base"], "seconds": time.monotonic() - seconds}
    for mode in ("til", "tail"):
        row[mode] = results[mode]["matrix"][-1]
    row["task_accuracy"] = results["tail"]["task_accuracy"]
    if boundaries == "none":
        row |= {key: results["online"][key] for key in ("score", "alarms", "dismissed", "segments")}
    return row


def main() -> None:
    import platform

    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("detect", "learn"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seeds", default="200-209")
    parser.add_argument("--test", default="page-hinkley")
    parser.add_argument("--method", default="moses")
    parser.add_argument("--seed", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, _, last = arguments.seeds.partition("-")
    jobs: dict[str, Any] = {}
    if arguments.part == "detect":
        for seed in range(int(first), int(last or first) + 1):
            key = f"detect {arguments.model} {arguments.test} {seed}"
            jobs[key] = lambda seed=seed: detect(arguments.model, seed, arguments.test)
    else:
        for boundaries in ("none", "given"):
            key = f"learn {arguments.model} {arguments.method} {arguments.seed} {boundaries}"
            jobs[key] = lambda boundaries=boundaries: learn(
                arguments.model, arguments.method, arguments.seed, boundaries
            )
    for key, job in jobs.items():
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if key not in rows:
            row = job()
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            rows[key] = {"torch": torch.__version__, "python": platform.python_version(), **row}
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(key, json.dumps({k: v for k, v in rows[key].items() if k not in ("segments", "alarms")}), flush=True)


if __name__ == "__main__":
    main()
