"""Tasks and where they come from: folders in TRACE's format, and the built-in streams. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moses.errors import StreamError
from moses.stream.builtin import BUILTIN_STREAMS, load_builtin
from moses.stream.folder import load_folder
from moses.stream.task import LOWER_IS_BETTER, METRICS, Example, Stream, Task, text_example

__all__ = ["BUILTIN_STREAMS", "LOWER_IS_BETTER", "METRICS", "Example", "Stream", "Task", "load_stream", "text_example"]


def load_stream(
    source: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    num_train: int | None = None,
    num_eval: int | None = None,
    num_test: int | None = None,
) -> Stream:
    """Load a built-in stream by its name, or a folder in TRACE's format (write `./demo` for a folder named as a
    built-in one).

    `tasks` chooses tasks and their order. `num_*` caps the examples of each task: evenly spaced rows of a folder's
    file, the size of a built-in stream's sample (None: all, and the built-in's own size). Raises StreamError with what
    to mend.
    """
    for name, number in (("num_train", num_train), ("num_eval", num_eval), ("num_test", num_test)):
        if number is not None and number < 1:
            raise StreamError(f"{name} is {number}: it must be 1 or more", code="bad_limit")
    limits = (num_train, num_eval, num_test)
    if isinstance(source, str) and source in BUILTIN_STREAMS:
        return load_builtin(source, tasks, limits)
    if isinstance(source, str) and os.sep not in source and not Path(source).exists():
        known = ", ".join(BUILTIN_STREAMS)
        raise StreamError(
            f"unknown stream {source!r}: no such folder, and the built-in ones are {known}", code="unknown_stream"
        )
    return load_folder(Path(source), tasks, limits)
