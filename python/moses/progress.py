"""What a long command says while it works: a live line on a terminal, a plain line now and then elsewhere, on stderr.

A phase is one stretch of work with a known number of steps: the training of a task, the evaluation of another.

    with Progress() as progress:
        with progress.phase("train 1/4 fomc", total=120) as phase:
            phase.update(1, loss=2.31)
        progress.say("fomc: 71.3")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from moses.report.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from transformers import Trainer, TrainerCallback

MIN_SECONDS = 5.0
"""Plain lines come at most this often, so that a log stays readable."""

NUM_LINES = 10
"""Plain lines of one phase come at every tenth of it, where that is slower."""


class Progress:
    """Where phases are shown: `stream`, stderr by default. `live` None: live where that is a terminal."""

    def __init__(
        self,
        stream: TextIO | None = None,
        live: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() if live is None else live
        self._quiet = quiet
        self._clock = clock
        self._rich: RichProgress | None = None

    def __enter__(self) -> Self:
        if self._live and not self._quiet:
            self._rich = _rich_progress(self._stream)
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def say(self, text: str) -> None:
        """One line that stays."""
        line = printable(text, 500)
        if self._quiet:
            return
        if self._rich is not None:
            self._rich.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def phase(self, title: str, total: int) -> Phase:
        """A stretch of `total` steps; use it in a `with`. Outside of `with Progress()` it shows plain lines."""
        return Phase(self, printable(title, 60), total)

    def _print(self, line: str) -> None:
        if not self._quiet:
            print(line, file=self._stream, flush=True)


class Phase:
    """One stretch of work; made by `Progress.phase`."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._title = title
        self._total = max(0, total)
        self._step = 0
        self._first = 0
        self._values: dict[str, float] = {}
        self._start = self._last_time = progress._clock()
        self._last_step = 0
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        rich = self._progress._rich
        if rich is not None:
            self._task = rich.add_task(self._title, total=self._total or None, values="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        rich = self._progress._rich
        if rich is not None and self._task is not None:
            rich.remove_task(self._task)
            self._task = None
        if kind is None:
            seconds = self._progress._clock() - self._start
            self._progress.say(f"{self._title}: done in {format_seconds(seconds)}{self._shown_values()}")

    def resize(self, total: int, step: int = 0) -> None:
        """Set the number of steps once it is known, and how many of them an earlier run has done."""
        self._total, self._step, self._first, self._last_step = max(0, total), step, step, step
        rich = self._progress._rich
        if rich is not None and self._task is not None:
            rich.update(self._task, total=self._total or None, completed=step)

    def update(self, step: int, **values: float) -> None:
        """Say that `step` steps are done, with numbers worth showing, such as the loss. Cheap: call it every step."""
        self._step = step
        self._values |= values
        rich = self._progress._rich
        if rich is not None and self._task is not None:
            rich.update(self._task, completed=step, values=self._shown_values())
            return
        now = self._progress._clock()
        due = now - self._last_time >= MIN_SECONDS and (step - self._last_step) * NUM_LINES >= self._total
        if due and step < self._total:
            self._last_time, self._last_step = now, step
            self._progress._print(self._line(now))

    def _line(self, now: float) -> str:
        done = self._step - self._first
        left = (now - self._start) / done * (self._total - self._step) if done > 0 else None
        shown_left = "" if left is None else f", {format_seconds(left)} left"
        return f"{self._title}: {self._step}/{self._total}{self._shown_values()}{shown_left}"

    def _shown_values(self) -> str:
        return "".join(f", {name} {value:.4g}" for name, value in self._values.items())


def trainer_callback(phase: Phase) -> TrainerCallback:
    """A callback of transformers' Trainer that moves a phase: steps, and the loss whenever the Trainer logs it."""
    from transformers import TrainerCallback

    class PhaseCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                phase.resize(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                phase.update(state.global_step)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                phase.update(state.global_step, loss=float(logs["loss"]))

    return PhaseCallback()


def show_in(trainer: Trainer, phase: Phase) -> None:
    """Let a Trainer report to a phase and to nothing else: its own bars and its printing of logs go."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for other in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(other)
    trainer.add_callback(trainer_callback(phase))


def format_seconds(seconds: float) -> str:
    """45 s, 12 min 5 s, 3 h 20 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rich_progress(stream: TextIO) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=False,
    )
