"""Progress: few plain lines without a terminal, a live line on one, numbers that are right."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from moses.progress import Progress, format_seconds, show_in


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds_a_step: float, total: int, **options) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with Progress(out, clock=clock, **options) as progress, progress.phase("train 1/4 fomc", total) as phase:
        for step in range(1, total + 1):
            clock.now += seconds_a_step
            phase.update(step, loss=2.0 / step)
    return out.getvalue().splitlines()


def test_fast_work_says_only_that_it_is_done():
    assert lines_of(0.001, 1000) == ["train 1/4 fomc: done in 1 s, loss 0.002"]


def test_slow_work_says_a_line_for_every_tenth():
    lines = lines_of(10.0, 100)
    assert len(lines) == 10
    assert lines[0] == "train 1/4 fomc: 10/100, loss 0.2, 15 min 0 s left"
    assert lines[-1] == "train 1/4 fomc: done in 16 min 40 s, loss 0.02"


def test_lines_never_come_faster_than_some_seconds():
    assert len(lines_of(0.1, 100)) == 2


def test_quiet_says_nothing():
    assert lines_of(10.0, 100, quiet=True) == []


def test_an_error_is_not_called_done():
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(out) as progress, progress.phase("x", 10):
        raise KeyboardInterrupt
    assert out.getvalue() == ""


def test_time_left_of_a_resumed_phase_counts_only_what_it_did():
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    phase = progress.phase("x", 0)
    phase.resize(100, step=50)
    clock.now += 30
    phase.update(60)
    assert out.getvalue() == "x: 60/100, 2 min 0 s left\n"


def test_names_are_one_printable_line():
    out = io.StringIO()
    with Progress(out) as progress:
        progress.say("a\nb\x1b[31m [bold]")
        with progress.phase("t\x1b[2J", 1):
            pass
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue().splitlines()) == 2


def test_a_terminal_has_a_live_line():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress(out) as progress:
        with progress.phase("train [1/4] fomc", 4) as phase:
            phase.resize(8, step=2)
            phase.update(4, loss=1.25)
            progress._rich.refresh()
        progress.say("fomc: [71.3]")
    shown = out.getvalue()
    assert "train [1/4] fomc" in shown and "4/8" in shown and "loss 1.25" in shown
    assert "fomc: [71.3]" in shown and "done in" in shown


def test_everything_goes_to_stderr():
    script = (
        "from moses.progress import Progress\n"
        "with Progress() as p, p.phase('x', 2) as phase:\n    phase.update(2)\n    p.say('hello')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[0] == "hello"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min"), (-1, "0 s")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_trainer_reports_to_the_phase_and_to_nothing_else(tmp_path, capsys):
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            return {"loss": ((x * self.weight) ** 2).mean()}

    rows = [{"x": torch.ones(1), "labels": torch.zeros(1)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        logging_steps=2,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(Model(), arguments, train_dataset=rows)
    out, clock = io.StringIO(), Clock()
    with Progress(out, clock=clock) as progress, progress.phase("train", 0) as phase:
        show_in(trainer, phase)
        real = phase.update

        def update(step, **values):
            clock.now += 10
            real(step, **values)

        phase.update = update
        trainer.train()
    lines = out.getvalue().splitlines()
    assert lines[-1].startswith("train: done in") and ", loss 0." in lines[-1]
    assert any(line.startswith("train: 4/8, loss 0.") for line in lines)
    captured = capsys.readouterr()
    assert "loss" not in captured.out and "%|" not in captured.err
