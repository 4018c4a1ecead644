"""Commands that run a model: train, evaluate, generate, forget."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moses.cli import calls
from moses.cli.output import print_fields, print_json, print_table
from moses.errors import ConfigError
from moses.report.text import format_bytes, format_score

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class EvaluationMode(StrEnum):
    """How the task of a prompt is known: given, inferred, or both in turn."""

    TIL = "til"
    TAIL = "tail"
    BOTH = "both"


class Boundaries(StrEnum):
    """Whether the stream says where its tasks begin."""

    GIVEN = "given"
    NONE = "none"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (train, evaluate, generate, forget):
        app.command()(command)


def train(
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="A model: a folder, a hub name, or a name that moses knows.")
    ],
    stream: Annotated[
        str, typer.Option("--stream", metavar="S", help="A stream: a folder in TRACE's format, or a built-in stream.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="How to learn: moses, sequential, per-task, finetune, joint, lifelong-moe, pangu-sigma."
        ),
    ] = "moses",
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B,C", help="Which tasks, in which order.")] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="M is a JSON file that describes a model: begin from random weights."),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="T", help="With --from-scratch: a tokenizer, instead of training one."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every random number.")] = 0,
    boundaries: Annotated[
        Boundaries, typer.Option("--boundaries", help="Where tasks begin: given, or none: found, in one pass.")
    ] = Boundaries.GIVEN,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="BYTES", help="What all tasks together may add: 2MB, 500kB.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, as JSON or text; may be given again."),
    ] = None,
) -> None:
    """Learn a stream of tasks, one after the other."""
    names = None if tasks is None else parse_tasks(tasks)
    values = parse_settings(settings or [])
    if tokenizer is not None and not from_scratch:
        raise ConfigError("--tokenizer goes with --from-scratch; a model has its own", code="bad_tokenizer")
    if from_scratch:
        model = calls.write_from_scratch(model, stream, out, names, tokenizer, seed)
    calls.train(
        model=model,
        stream=stream,
        method=method,
        out=out,
        tasks=names,
        resume=resume,
        seed=seed,
        settings=values,
        boundaries=boundaries.value,
        budget=budget,
    )
    _print_results(out)
    typer.echo(f"\nreport: moses report {out}")


def evaluate(
    run: RunFolder,
    mode: Annotated[
        EvaluationMode, typer.Option("--mode", help="The task given (til), inferred (tail), or both.")
    ] = EvaluationMode.BOTH,
    as_json: AsJson = False,
) -> None:
    """Evaluate every task of a run again."""
    scores = calls.evaluate(run, mode.value)
    if as_json:
        print_json(scores)
        return
    modes = [(title, scores[key]) for key, title in (("til", "TIL"), ("tail", "TaIL")) if key in scores]
    rows = [[title, *map(format_score, found["row"]), format_score(found["op"])] for title, found in modes]
    print_table("score by task, now", ["", *scores["tasks"], "mean"], rows)


def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to answer.")],
    task: Annotated[
        str, typer.Option("--task", metavar="T", help="The task, or auto to infer it from the prompt.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, and say of which task it is."""
    answer = calls.answer(run, task, prompt)
    if as_json:
        print_json(answer)
        return
    probability = answer.get("task_probability")
    sure = "" if probability is None else f" ({100 * probability:.1f}%)"
    name = answer.get("task")
    print_fields([("task", f"{'unknown' if name is None else name}{sure}")])
    typer.echo(answer["answer"])


def forget(
    run: RunFolder,
    task: Annotated[str, typer.Option("--task", metavar="T", help="The task to remove.")],
    as_json: AsJson = False,
) -> None:
    """Remove a task, and free what only it used."""
    forgotten = calls.forget(run, task)
    if as_json:
        print_json(forgotten)
    else:
        print_fields([("forgotten", task), ("freed", format_bytes(forgotten["bytes_freed"]))])


def parse_tasks(text: str) -> list[str]:
    """`a,b,c` as names. Raises ConfigError for an empty name."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--tasks {text!r}: a name is empty; write --tasks a,b,c", code="bad_tasks")
    return names


def parse_settings(items: list[str]) -> dict[str, Any]:
    """`key=value` pairs; a value that is no JSON is a text. Raises ConfigError for no key, or one given twice."""
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {item!r}: not key=value; write for example --set rank=4", code="bad_setting")
        if key in settings:
            raise ConfigError(f"--set {key}: given twice; give it once", code="bad_setting")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def _print_results(run: Path) -> None:
    from moses.report.results import read_results

    results = read_results(run)
    modes = [(name, mode) for name, mode in (("TIL", results.til), ("TaIL", results.tail)) if mode is not None]
    for name, mode in modes:
        rows: list[list[str]] = []
        if results.base is not None:
            rows.append(["base model", *map(format_score, results.base)])
        rows += [
            [f"after {task}", *map(format_score, row)] for task, row in zip(results.tasks, mode.matrix, strict=False)
        ]
        what = results.score_name if results.lower_is_better else "score"
        print_table(f"{name}, {what} by task", ["", *results.tasks], rows)
    measures = [
        (key.upper(), ", ".join(f"{format_score(mode.metrics.get(key))} ({name})" for name, mode in modes))
        for key in ("op", "bwt", "fwt")
    ]
    if results.tail is not None and results.tail.task_accuracy is not None:
        measures.append(("task inferred right", f"{format_score(results.tail.task_accuracy)}%"))
    if results.capacity:
        measures.append(("bytes added", format_bytes(sum(task.total_bytes for task in results.capacity))))
    print_fields(measures)
