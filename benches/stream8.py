"""Methods of continual learning on the eight tasks of stream8 with MiniLM: OP, BWT, TaIL OP and bytes a method and seed.

    python benches/stream8.py --stream ../shared/data/stream8 [--seeds 0,1,2] [--only NAME,NAME] [--work build/stream8]

Each row is one run of `moses.train` in a process of its own; a row that is in benches/results/stream8.json already is not
measured again, so that an interrupted measurement goes on. Settings were chosen on the eval splits; scores are of all 6,200
test items. `--split eval` scores the eval splits instead and writes to stream8_eval.json: that is how settings are chosen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TRAINING = {
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.1,
    "max_length": 128,
    "precision": "bfloat16",
    "eval_batch_size": 64,
    "eval_rows": "final",
}
MOSES = {"learning_rate": 3e-3, "density": 0.15, "candidates": 12}
# name: (method, rank as the table says it, settings beyond TRAINING)
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "moses": ("moses", 8, MOSES),
    "moses-small": ("moses", 8, {}),
    "moses-no-reuse": ("moses", 8, MOSES | {"reuse": "none"}),
    "moses-adapter": ("moses", 8, MOSES | {"ffn_experts": "adapter"}),
    "per-task-lora-1": ("per-task", 1, {"rank": 1}),
    "per-task-lora-2": ("per-task", 2, {"rank": 2}),
    "per-task-lora-4": ("per-task", 4, {"rank": 4}),
    "per-task-lora-8": ("per-task", 8, {"rank": 8}),
    "per-task-vera-256": ("per-task", 256, {"adapter": "vera", "rank": 256, "learning_rate": 2e-2}),
    "per-task-ia3": ("per-task", 0, {"adapter": "ia3", "learning_rate": 2e-2}),
    "sequential-lora-1": ("sequential", 1, {"rank": 1}),
    "sequential-lora-2": ("sequential", 2, {"rank": 2}),
    "sequential-lora-4": ("sequential", 4, {"rank": 4}),
    "sequential-lora-8": ("sequential", 8, {"rank": 8}),
}


def measure(
    name: str, seed: int, stream: str, split: str, work: Path, extra: dict[str, Any], tasks: str | None
) -> dict[str, Any]:
    """Run one variant here and return its row."""
    import dataclasses

    import torch

    import moses
    from moses.models import load_model
    from moses.stream import Stream

    method, rank, settings = VARIANTS[name]
    loaded = moses.load_stream(Path(stream), tasks.split(",") if tasks else None)
    if split == "eval":
        loaded = Stream(loaded.name, tuple(dataclasses.replace(task, test=task.eval) for task in loaded.tasks))
    model, tokenizer, _ = load_model("minilm")
    # what costs the time of a step on a CPU and nothing else: the fused attention's backward in bfloat16, and dropout
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    marks = record_marks()
    started = time.monotonic()
    run = moses.train(
        model,
        tokenizer,
        stream=loaded,
        method=method,
        output_dir=work / f"{name}-{seed}",
        seed=seed,
        resume=True,
        settings=TRAINING | settings | extra,
    )
    results = run.results
    totals = [sum(size for kind, size in task["bytes"].items() if kind != "identifier") for task in results["capacity"]]
    if method == "sequential":  # each end of task writes over the one LoRA, which is there once
        totals = [totals[0], *(task["bytes"]["heads"] + task["bytes"]["masks"] for task in results["capacity"][1:])]
    weights = sum(task["bytes"]["weights"] for task in results["capacity"])
    shared = None
    if results["overlap"]:
        overlap, size = results["overlap"], len(results["overlap"])
        shared = sum(max(overlap[t][:t], default=0) for t in range(size)) / max(
            1, sum(overlap[t][t] for t in range(size))
        )
    return {
        "method": name,
        "rank": rank,
        "seed": seed,
        "op": run.metrics["op"],
        "bwt": run.metrics["bwt"],
        "tail_op": results["tail"]["metrics"]["op"],
        "bytes": sum(totals),
        "first_bytes": totals[0],
        "last_bytes": totals[-1],
        "weight_bytes": weights,
        "identifier_bytes": sum(task["bytes"]["identifier"] for task in results["capacity"]),
        "task_accuracy": results["tail"]["task_accuracy"],
        "shared_fraction": shared,
        "row": run.matrix[-1],
        "items": {task.name: marks[task.name] for task in loaded.tasks},
        "seconds": time.monotonic() - started,
        "settings": TRAINING | settings | extra,
        "per_task_bytes": totals,
        "environment": results["environment"],
    }


def record_marks() -> dict[str, str]:
    """Keeps which answers were right the last time that each task was scored with the task given: as a number in hexadecimal, whose first
    binary digit (of as many as there are items) is the first item."""
    from moses import evaluate

    marks: dict[str, str] = {}
    original = evaluate.Evaluator.til_row

    def til_row(self: Any, trained: Any, columns: Any, tick: Any) -> Any:
        scorer = evaluate.score
        names = iter(
            [self.stream.tasks[column].name for column in columns if self.stream.tasks[column].name in trained]
        )

        def score(metric: str, answers: Any, references: Any, prompts: Any) -> float:
            right = [
                scorer(metric, [answer], [reference], [prompt]) > 0
                for answer, reference, prompt in zip(answers, references, prompts, strict=True)
            ]
            bits = "".join(map(str, map(int, right)))
            marks[next(names)] = f"{int(bits, 2):0{-(-len(bits) // 4)}x}"
            return scorer(metric, answers, references, prompts)

        evaluate.score = score
        try:
            return original(self, trained, columns, tick)
        finally:
            evaluate.score = scorer

    evaluate.Evaluator.til_row = til_row  # type: ignore[method-assign]
    return marks


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far; another process may have added some since the last look."""
    return json.loads(path.read_text()) if path.exists() else []


def main() -> None:
    """Measure what is missing, one process a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", default="../shared/data/stream8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--split", choices=("test", "eval"), default="test")
    parser.add_argument("--tasks")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--label", default="", help="appended to the method's name in the row")
    parser.add_argument("--work", type=Path, default=Path("build/stream8"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    extra = {pair.split("=", 1)[0]: json.loads(pair.split("=", 1)[1]) for pair in arguments.set}
    work = arguments.work / arguments.split / (arguments.label or "plain")
    if arguments.row:
        name, seed = arguments.row.rsplit(":", 1)
        print(json.dumps(measure(name, int(seed), arguments.stream, arguments.split, work, extra, arguments.tasks)))
        return
    path = HERE / "results" / ("stream8.json" if arguments.split == "test" else "stream8_eval.json")
    path.parent.mkdir(exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.only.split(","):
            label = name + arguments.label
            if any((row["method"], row["seed"]) == (label, seed) for row in read_rows(path)):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--row", f"{name}:{seed}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(output.splitlines()[-1]) | {"method": label}
            path.write_text(json.dumps([*read_rows(path), row], indent=1) + "\n")
            print(
                f"{label:24} seed {seed}  OP {row['op']:.2f}  BWT {row['bwt']}  bytes {row['bytes']}  {row['seconds']:.0f} s",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
