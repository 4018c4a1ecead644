"""Growing, pruning and extracting a run of moses, behind the commands that do the same to checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from moses.cli import calls
from moses.cli.output import print_fields, print_json, print_table
from moses.errors import SurgeryError
from moses.report.text import format_bytes, format_score


def refuse(what: str, options: Mapping[str, Any]) -> None:
    """Raise for the first option that was given and that `what` does not have."""
    for name, value in options.items():
        if value not in (None, False):
            raise typer.BadParameter(f"{name} is not for {what}")


def require_out(out: Path | None) -> Path:
    """The folder to write, which must be given."""
    if out is None:
        raise typer.BadParameter("a run is written anew: give --out")
    return out


def layers_of(text: str | None) -> Any:
    """`all`, or blocks' numbers and paths, separated by commas."""
    if text is None or text == "all":
        return "all"
    return [int(part) if part.isdecimal() else part for part in (part.strip() for part in text.split(","))]


def grow(
    run: Path,
    out: Path | None,
    layers: str | None,
    add: int,
    source: str | None,
    noise: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """`moses grow RUN`."""
    if source is not None and not source.isdecimal() and source not in ("most-used", "fresh"):
        raise SurgeryError(
            f"--from {source!r}: of a run, give most-used, fresh, or the number of an expert", code="bad_choice"
        )
    done = calls.grow_run(
        run,
        require_out(out),
        layers=layers_of(layers),
        add=add,
        source="most-used" if source is None else int(source) if source.isdecimal() else source,
        noise=0.01 if noise is None else noise,
        seed=seed,
    )
    _show(done, as_json)


def prune(
    run: Path,
    out: Path | None,
    layers: str | None,
    options: Mapping[str, Any],
    experts: list[int] | None,
    by: str,
    calibrate: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`moses prune RUN`."""
    done = calls.prune_run(
        run, out, layers=layers_of(layers), experts=experts, by=by, calibrate=calibrate, dry_run=dry_run, **options
    )
    _show(done, as_json)


def extract(run: Path, domain: str | None, out: Path | None, merge_group: bool, as_json: bool) -> None:
    """`moses extract RUN`."""
    if domain is None:
        raise typer.BadParameter("give --domain: a domain or task of the run")
    made = calls.extract_run(run, domain, require_out(out), merge_group)
    if as_json:
        print_json(made)
        return
    kind = made["model_type"]
    fields = [
        ("task", made["task"]),
        ("format", "moses's own: load it with moses.load" if kind == "moses" else f"{kind}, which transformers loads"),
    ]
    if made["perplexity_after"] is not None:
        fields.append(("perplexity", f"{made['perplexity_before']:.3f} -> {made['perplexity_after']:.3f}"))
    print_fields([*fields, ("result", made["path"])])


def _show(done: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done))
        return
    rows = [[layer, count, done.experts_after.get(layer, 0)] for layer, count in done.experts_before.items()]
    print_table("experts", ["layer", "before", "after"], rows)
    if done.scores_before:
        scores = [
            [task, format_score(score), format_score(done.scores_after.get(task))]
            for task, score in done.scores_before.items()
        ]
        print_table("score by task", ["task", "before", "after"], scores)
    print_fields(
        [
            ("bytes", f"{format_bytes(done.bytes_before)} -> {format_bytes(done.bytes_after)}"),
            ("result", done.path or "nothing was written (dry run)"),
        ]
    )
