"""Held-out perplexity, domain by domain after each stage, of methods that learn a stream of text domains.

    python benches/domains.py [--seeds 0,1,2] [--only NAME,NAME] [--work build/domains] [--table]

The base models are trained by this script, once, on all of the stream's first two domains (English and code) and a few passages of
each other one, as a pretrained model has seen a little of everything (`--mix 0`: those two alone): a Llama with a dense FFN of
width 768, and a Mixtral with two experts of width 384, both of which a token uses, so that both have the same active parameters.
Lifelong-MoE begins from the second, all else from the first, and full fine-tuning and joint training from the second as well; every
stage has the same tokens. Each row is one run of `moses.train` in a process of its own; a row that is in
benches/results/domains.json already is not measured again, so that an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "domains.json"
DOMAINS = ("english", "code", "german", "russian", "japanese")
SIZES = {"num_train": 110, "num_eval": 8, "num_test": 24}
VOCABULARY = 2048
WIDTHS = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BASES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", "intermediate_size": 768},
    "moe": {"model_type": "mixtral", "intermediate_size": 384, "num_local_experts": 2, "num_experts_per_tok": 2},
}
TRAINING: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.1,
    "max_length": 128,
    "eval_modes": ["til"],
}
# name: (method, base, settings beyond TRAINING)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "finetune": ("finetune", "dense", {}),
    "finetune-kl": ("finetune", "dense", {"kl": 1.0}),
    "joint": ("joint", "dense", {}),
    "lifelong-moe": ("lifelong-moe", "moe", {"add": 2, "kl": 0.1, "learning_rate": 4e-3}),
    "pangu-sigma": ("pangu-sigma", "dense", {"experts_per_group": 1, "upper": 1.0, "learning_rate": 4e-3}),
    "finetune-moe": ("finetune", "moe", {}),
    "joint-moe": ("joint", "moe", {}),
}


def streams(mix: int) -> tuple[Any, Any]:
    """The stream that is learned, and the one of the base models: all of the first two domains, and `mix` passages of each other one that the
    first leaves out."""
    import dataclasses

    from moses.stream import Stream, load_stream

    whole = load_stream("domains", list(DOMAINS), **SIZES)
    known = load_stream("domains", list(DOMAINS[:2]), num_train=1000)
    base = [row for task in known.tasks for row in task.train]
    learned = list(whole.tasks[:2])
    for task in whole.tasks[2:]:
        held = task.train[:: max(1, len(task.train) // mix)][:mix] if mix else ()
        base += held
        learned.append(dataclasses.replace(task, train=tuple(row for row in task.train if row not in held)))
    mixed = dataclasses.replace(whole.tasks[0], name="base", train=tuple(base))
    return Stream("domains", tuple(learned)), Stream("base", (mixed,))


def base_model(name: str, mix: int, work: Path, epochs: int) -> Path:
    """The folder of a base model, trained where it is not there. Two processes do not train the same one."""
    import moses
    from moses.growth.folder import save_model
    from moses.scratch import make_model, make_tokenizer

    folder = work / f"base-{name}-mix{mix}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (work / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        learned, base = streams(mix)
        # a pretrained tokenizer knows all of its languages; this one has read the training texts of all domains
        texts = [row.answer for task in (*base.tasks, *learned.tasks) for row in task.train]
        tokenizer = make_tokenizer(texts, VOCABULARY)
        model = make_model(WIDTHS | BASES[name], tokenizer)
        started = time.monotonic()
        run = moses.train(
            model,
            tokenizer,
            stream=base,
            method="finetune",
            output_dir=work / f"{folder.name}-run",
            resume=True,
            settings=TRAINING | {"epochs": epochs},
        )
        run.model.config.output_router_logits = False
        save_model(run.model, folder, tokenizer)
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - started))
    return folder


def active_parameters(model: Any, experts_a_token: int) -> int:
    """Parameters that take part in a token's forward: all but the experts that it does not use (and gates count)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            total -= parameter.numel() * max(0, parameter.shape[0] - experts_a_token) // parameter.shape[0]
    return total


def measure(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one variant here and return its row."""
    import torch

    import moses
    from moses.models import load_model

    torch.set_num_threads(arguments.threads)
    method, base, settings = VARIANTS[name]
    extra = {pair.split("=", 1)[0]: json.loads(pair.split("=", 1)[1]) for pair in arguments.set}
    folder = base_model(base, arguments.mix, arguments.work, arguments.base_epochs)
    learned, _ = streams(arguments.mix)
    model, _, _ = load_model(str(folder))
    active = active_parameters(model, 2)
    started = time.monotonic()
    run = moses.train(
        str(folder),
        stream=learned,
        method=method,
        output_dir=arguments.work / f"{name}{arguments.label}-mix{arguments.mix}-seed{seed}",
        seed=seed,
        resume=True,
        settings=TRAINING | settings | extra,
    )
    results, matrix = run.results, run.matrix
    size = len(DOMAINS)
    learned_at = [matrix[at][at] for at in range(size)]
    lost = [100.0 * (matrix[-1][at] / learned_at[at] - 1.0) for at in range(size - 1)]
    return {
        "method": name + arguments.label,
        "seed": seed,
        "mix": arguments.mix,
        "domains": list(DOMAINS),
        "base": results["base"],
        "matrix": matrix,
        "mean": sum(matrix[-1]) / size,
        "lost_percent": lost,
        "worst_lost_percent": max(lost),
        "active_parameters": active,
        # frozen experts are buffers
        "parameters_after": sum(
            tensor.numel() for tensor in (*run.model.parameters(), *run.model.buffers()) if tensor.is_floating_point()
        ),
        "bytes": [sum(task["bytes"].values()) - task["bytes"]["identifier"] for task in results["capacity"]],
        "seconds": results["seconds"] | {"wall": time.monotonic() - started},
        "base_seconds": json.loads((folder / "seconds.json").read_text()),
        "settings": TRAINING | settings | extra,
        "environment": results["environment"],
    }


def read_rows() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def add_row(row: dict[str, Any], work: Path) -> None:
    """Append a row; another process may be appending too."""
    RESULTS.parent.mkdir(exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        RESULTS.write_text(json.dumps([*read_rows(), row], indent=1) + "\n")


def table() -> str:
    """The rows as Markdown: the last row of each matrix, what each domain lost since its own stage, and the mean against joint training."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows():
        groups.setdefault(row["method"], []).append(row)
    lines = [
        f"| method | seeds | {' | '.join(DOMAINS)} | mean | worst loss of an old domain |",
        "|" + " --- |" * (len(DOMAINS) + 4),
    ]
    for method, rows in groups.items():
        cells = [f"{_mean([row['matrix'][-1][at] for row in rows]):.2f}" for at in range(len(DOMAINS))]
        mean, lost = _mean([row["mean"] for row in rows]), _mean([row["worst_lost_percent"] for row in rows])
        lines.append(
            f"| {method} | {len(rows)} | {' | '.join(cells)} | {mean:.2f} | {'-' if 'joint' in method else f'{lost:+.1f}%'} |"
        )
    for method, rows in groups.items():
        lines += [
            "",
            f"{method}, seed {rows[0]['seed']}: perplexity of each domain (column) after each stage (row)",
            "",
        ]
        lines += [f"| | {' | '.join(DOMAINS)} |", "|" + " --- |" * (len(DOMAINS) + 1)]
        shown = [("base", rows[0]["base"]), *zip(DOMAINS, rows[0]["matrix"], strict=True)]
        lines += [f"| {label} | {' | '.join(f'{cell:.2f}' for cell in cells)} |" for label, cells in shown]
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measure what is missing, one process a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--label", default="", help="appended to the method's name in the row")
    parser.add_argument(
        "--mix", type=int, default=30, help="passages of each later domain that the base model has read"
    )
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/domains"))
    parser.add_argument("--table", action="store_true", help="print the rows measured so far as Markdown")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if arguments.row:
        name, seed = arguments.row.rsplit(":", 1)
        print(json.dumps(measure(name, int(seed), arguments)))
        return
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.only.split(","):
            label = name + arguments.label
            if any((row["method"], row["seed"], row["mix"]) == (label, seed, arguments.mix) for row in read_rows()):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--row", f"{name}:{seed}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            add_row(row, arguments.work)
            print(
                f"{label:16} seed {seed}  mean {row['mean']:.2f}  worst loss {row['worst_lost_percent']:+.1f}%  "
                f"{row['seconds']['wall']:.0f} s",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
