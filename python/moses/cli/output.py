"""What commands print: one JSON document, or tables for people, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moses.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE = 1000


def one_line(text: str) -> str:
    """A message as one printable line."""
    return printable(" ".join(text.split()), MAX_MESSAGE)


def print_json(document: Any) -> None:
    """One JSON document, in ASCII so that no terminal and no name can spoil it."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def console() -> Console:
    """Where tables go: without markup, for names may hold anything; 120 wide in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    return Console(markup=False, emoji=False, highlight=False, width=width, soft_wrap=False)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], num_text: int = 1) -> None:
    """A table: the first `num_text` columns are texts, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(head):
        table.add_column(Text(name), justify="left" if at < num_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if title:
        print(title)
    console().print(table)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Names and values, a line each."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name:<{width}}  {printable(value, 4000)}")
