"""The one place where commands call what needs torch: a function a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def train(
    *,
    model: str,
    stream: str,
    method: str,
    out: Path,
    tasks: Sequence[str] | None,
    resume: bool,
    seed: int,
    settings: Mapping[str, Any],
    boundaries: str,
    budget: str | None,
) -> None:
    """Train a stream; results are in the run folder afterwards."""
    from moses.training import train as run

    run(
        model,
        stream=stream,
        method=method,
        output_dir=out,
        tasks=tasks,
        resume=resume,
        seed=seed,
        settings=dict(settings),
        boundaries=boundaries,
        budget=budget,
    )


def write_from_scratch(
    config: str, stream: str, out: Path, tasks: Sequence[str] | None, tokenizer: str | None, seed: int
) -> str:
    """The folder `OUT-base` with a model of random weights, written unless it is there: a run that is resumed begins from the same."""
    from moses.scratch import write_from_scratch as write
    from moses.stream import load_stream

    folder = out.with_name(f"{out.name}-base")
    if not folder.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        write(config, load_stream(stream, tasks), folder, tokenizer=tokenizer, seed=seed)
    return str(folder)


def evaluate(run: Path, mode: str) -> dict[str, Any]:
    """Evaluate all ended tasks of a run again: {"method", "tasks", "til": {"row", "op"}, "tail": {.., "confusion"}}."""
    from moses.evaluate import evaluate_run

    return evaluate_run(run, mode)


def answer(run: Path, task: str, prompt: str) -> dict[str, Any]:
    """Answer one prompt, `task` being a name or "auto": {"task", "task_probability", "answer"}; no task is unknown."""
    from moses.generate import answer as run_answer

    return run_answer(run, task, prompt)


def forget(run: Path, task: str) -> dict[str, Any]:
    """Remove a task from a run folder, and free what only it used: {"task", "bytes_freed", "method"}."""
    from moses.checkpoint import forget_task

    return forget_task(run, task)


def grow_run(run: Path, out: Path, **options: Any) -> Any:
    """Add experts to a run: see `moses.run_surgery.grow_run`."""
    from moses.run_surgery import grow_run as work

    return work(run, out, **options)


def prune_run(run: Path, out: Path | None, budget: str | None, **options: Any) -> Any:
    """Take experts out of a run: see `moses.run_surgery.prune_run`."""
    from moses.budget import parse_bytes
    from moses.run_surgery import prune_run as work

    return work(run, out, budget=None if budget is None else parse_bytes(budget), **options)


def usage_of(checkpoint: Path, stream: str, by: str) -> dict[str, list[float]]:
    """How much each expert of a checkpoint is used: see `moses.growth.calibrate.usage_of`."""
    from moses.growth.calibrate import usage_of as work

    return work(checkpoint, stream, "norm" if by == "norm" else "use")


def extract_run(run: Path, domain: str, out: Path, merge_group: bool) -> dict[str, Any]:
    """Write the model of one domain: see `moses.run_extract.extract_run`."""
    from moses.run_extract import extract_run as work

    return work(run, domain, out, merge_group=merge_group)
