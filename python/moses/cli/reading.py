"""Commands that only read: report, compare, inspect, verify, doctor. None of them imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moses.cli.running import AsJson, RunFolder

AnyPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A run folder, or a checkpoint: a folder or a safetensors file.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (report, compare, inspect, verify, doctor):
        app.command()(command)


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write; the run folder by default.")
    ] = None,
) -> None:
    """Write a self-contained page, and pictures.

    What backs the six properties of lifelong learning is shown as well; the last line says where the page is.
    """
    from moses.cli.output import print_fields, print_table
    from moses.report import read_results, write_report
    from moses.report.properties import HEAD, command_of, properties

    page = write_report(run, out)
    results = read_results(run)
    rows = [[found.name, found.shown, found.how] for found in properties(results)]
    print_table("lifelong-learning properties", HEAD, rows, num_text=3)
    print_fields([("made by", command_of(results))])
    typer.echo(page)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of one stream.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the table as HTML too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show runs side by side."""
    from moses.cli.output import print_fields, print_json, print_table
    from moses.report.compare import HEAD, compare_page, compare_runs, property_rows

    rows = compare_runs(runs)
    if html is not None:
        from moses._core import atomic_write

        atomic_write(html, compare_page(rows).encode("utf-8"))
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        print_table("", HEAD, [row.cells() for row in rows], num_text=2)
        if any(row.lower_is_better for row in rows):
            print("OP, BWT and FWT are perplexities: lower is better, a BWT above 0 is a loss\n")
        names = [row.run for row in rows]
        print_table("lifelong-learning properties", ["property", *names], property_rows(rows), num_text=1 + len(rows))
        print_fields([(f"{row.run}, made by", row.command) for row in rows])


def inspect(path: AnyPath, as_json: AsJson = False) -> None:
    """Say what is in a run or a checkpoint.

    Layers, experts, tasks, masks and bytes, from the registry and from headers.
    """
    from moses.cli import show

    show.inspect(path, as_json)


def verify(
    path: AnyPath,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="OLD",
            help="An older copy of a run, or what a checkpoint was made of: what was kept must be the same, bit for bit.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check hashes, invariants and frozen bits.

    The exit code is 1 where something is wrong.
    """
    from moses.verify import verify_path

    verdict = verify_path(path, against or None)
    _finish(verdict.as_dict(), as_json, "show_verdict")


def doctor(
    full: Annotated[bool, typer.Option("--full", help="Import torch too, and ask it for its devices.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and lacks.

    With the command that mends what is missing; the exit code is 1 where moses cannot work without it.
    """
    from moses.doctor import examine

    _finish(examine(full).as_dict(), as_json, "show_checkup")


def _finish(document: dict[str, Any], as_json: bool, show: str) -> None:
    if as_json:
        from moses.cli.output import print_json

        print_json(document)
    else:
        from moses.cli import show as shows

        getattr(shows, show)(document)
    if not document["ok"]:
        raise typer.Exit(1)
