"""Runs side by side: the same stream, different methods or settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from moses.errors import RunError
from moses.report.properties import NAMES, Property, command_of, properties
from moses.report.results import Results, read_results
from moses.report.text import format_bytes, format_score, format_share, printable

HEAD = ("run", "method", "OP", "BWT", "FWT", "TaIL OP", "task accuracy", "bytes added", "bank in use")


@dataclass(frozen=True, slots=True)
class Row:
    """One run: scores, bytes over all tasks, the share of the bank in use, the six properties; None is not measured.

    Scores go from 0 to 100, or are perplexities, where lower is better.
    """

    run: str
    method: str
    seed: int | None
    op: float | None
    bwt: float | None
    fwt: float | None
    tail_op: float | None
    task_accuracy: float | None
    bytes_added: int | None
    bank_fraction: float | None
    lower_is_better: bool
    properties: tuple[Property, ...]
    command: str

    def cells(self) -> list[str]:
        """The row as it is shown, in the order of `HEAD`."""
        scores = [format_score(score) for score in (self.op, self.bwt, self.fwt, self.tail_op, self.task_accuracy)]
        return [self.run, self.method, *scores, format_bytes(self.bytes_added), format_share(self.bank_fraction)]

    def as_dict(self) -> dict[str, object]:
        """The row for JSON."""
        return asdict(self)


def compare_runs(runs: Sequence[str | Path]) -> list[Row]:
    """One row a run, in the order given. Raises RunError where their streams differ, and what `read_results` raises."""
    results = [read_results(run) for run in runs]
    for run, other in zip(runs[1:], results[1:], strict=True):
        _check_same_stream(runs[0], results[0], run, other)
    return [_row(run, result) for run, result in zip(runs, results, strict=True)]


def compare_page(rows: Sequence[Row]) -> str:
    """The table as a fragment of HTML that can be put into any page."""
    head = "".join(f"<th>{escape(title)}</th>" for title in HEAD)
    cells = [[f"<td>{escape(printable(cell))}</td>" for cell in row.cells()] for row in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in cells)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"
    return table + _properties_page(rows)


def property_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The six properties, a row each with a column a run: its name, then what each run measured."""
    return [[name, *(row.properties[at].shown for row in rows)] for at, name in enumerate(NAMES)]


def _properties_page(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(printable(title))}</th>" for title in ("property", *(row.run for row in rows)))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in cells)}</tr>\n"
        for cells in property_rows(rows)
    )
    commands = "".join(
        f"<li>{escape(printable(row.run))}: <code>{escape(printable(row.command, 2000))}</code></li>\n" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n<ul>\n{commands}</ul>\n"


def _check_same_stream(first: str | Path, expected: Results, run: str | Path, found: Results) -> None:
    mend = "compare runs of one stream"
    if expected.tasks != found.tasks:
        pairs = enumerate(zip(expected.tasks, found.tasks, strict=False))
        at = next((number for number, (one, two) in pairs if one != two), None)
        if at is None:
            what = f"it has {len(found.tasks)} tasks where {first} has {len(expected.tasks)}"
        else:
            what = f"its task {at + 1} is {found.tasks[at]!r} where {first} has {expected.tasks[at]!r}"
        raise RunError(f"{run}: its stream is another: {what}; {mend}", code="streams_differ")
    streams = [result.config.get("stream") for result in (expected, found)]
    prints = [stream.get("digest") if isinstance(stream, dict) else None for stream in streams]
    if None not in prints and prints[0] != prints[1]:
        what = f"its tasks have the names of those of {first}, but other examples"
        raise RunError(f"{run}: {what}; {mend}", code="streams_differ")


def _row(run: str | Path, results: Results) -> Row:
    til = {} if results.til is None else results.til.metrics
    tail = results.tail
    settings = results.config.get("train_config")
    seed = settings.get("seed") if isinstance(settings, dict) else None
    return Row(
        run=str(run),
        method=results.method,
        seed=seed if isinstance(seed, int) else None,
        op=til.get("op"),
        bwt=til.get("bwt"),
        fwt=til.get("fwt"),
        tail_op=None if tail is None else tail.metrics.get("op"),
        task_accuracy=None if tail is None else tail.task_accuracy,
        bytes_added=sum(task.total_bytes for task in results.capacity) if results.capacity else None,
        bank_fraction=results.capacity[-1].bank_fraction if results.capacity else None,
        lower_is_better=results.lower_is_better,
        properties=properties(results),
        command=command_of(results),
    )
