"""Curves and bars over the tasks: scores over time, bytes added, fraction of the bank. Each returns a PNG as bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from moses.report.canvas import GRID, INK, MUTED, SERIES, label, new_figure, png_bytes, style
from moses.report.heatmaps import MAX_PANELS
from moses.report.results import Mode, Results
from moses.report.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
# the first is broad, so that it is still seen where the second lies on it
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": SERIES[0], "linewidth": 3.4, "alpha": 0.55, "marker": "o", "markersize": 4.5},
    {"color": SERIES[1], "linewidth": 1.3, "linestyle": (0, (3, 1.5)), "marker": "s", "markersize": 2.8},
)


def score_curves(results: Results) -> bytes:
    """A panel a task: its score after each training, from the base model on, in both modes; where it was trained."""
    tasks = results.tasks[:MAX_PANELS]
    modes = [(name, mode, look) for (name, mode), look in zip(_modes(results), _LOOKS, strict=False)]
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    with style():
        figure = new_figure(max(5.2, 2.5 * columns + 0.5), 1.75 * rows + 0.6)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        handles = {}
        for at, panel in enumerate(panels.flat):
            if at >= len(tasks):
                panel.set_visible(False)
                continue
            panel.set_title(label(tasks[at]), fontsize=9)
            panel.grid(axis="y", color=GRID)
            panel.set_axisbelow(True)
            handles["trained here"] = panel.axvline(at + 1, color=MUTED, linewidth=0.8, linestyle=":")
            for name, mode, look in modes:
                points = _points(results.base, mode, at)
                (handles[name],) = panel.plot(*points, **look)
        if results.lower_is_better:
            panels.flat[0].set_yscale("log")
        else:
            panels.flat[0].set_ylim(0, min(max(panels.flat[0].get_ylim()[1], 1.0), 103))
        panels.flat[0].set_xlim(-0.3, len(results.tasks) + 0.3)
        panels.flat[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.supxlabel("tasks trained (0: the base model)", fontsize=9)
        figure.supylabel("perplexity (lower is better)" if results.lower_is_better else "score", fontsize=9)
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=8.5)
        return png_bytes(figure)


def bytes_bars(results: Results) -> bytes:
    """What each task added, in bytes, stacked by kind, with the sum on top."""
    capacity = results.capacity
    kinds = list(dict.fromkeys(kind for task in capacity for kind in task.bytes))
    with style():
        figure = new_figure(max(5.0, 0.75 * len(capacity) + 1.8), 3.4)
        axes = figure.add_subplot()
        foot = [0] * len(capacity)
        for kind, colour in zip(kinds, _cycle(len(kinds)), strict=True):
            sizes = [task.bytes.get(kind, 0) for task in capacity]
            if any(sizes):
                look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.5}
                axes.bar(range(len(capacity)), sizes, 0.66, foot, label=label(kind), **look)
            foot = [below + size for below, size in zip(foot, sizes, strict=True)]
        if len(capacity) <= 24:
            for at, total in enumerate(foot):
                axes.annotate(format_bytes(total), (at, total), (0, 3), **_ABOVE)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(round(size)).replace(".0 ", " ")))
        axes.set_title("Bytes that each task added", pad=10)
        _task_axis(axes, [task.task for task in capacity])
        if any(foot):
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, reverse=True)
        axes.margins(y=0.1)
        return png_bytes(figure)


def bank_curve(results: Results) -> bytes:
    """The share of the bank that is in use after each task."""
    capacity = [task for task in results.capacity if task.bank_fraction is not None]
    shares = [100 * (task.bank_fraction or 0.0) for task in capacity]
    with style():
        figure = new_figure(max(5.0, 0.75 * len(capacity) + 1.8), 2.8)
        axes = figure.add_subplot()
        axes.fill_between(range(len(shares)), shares, color=SERIES[0], alpha=0.15, linewidth=0)
        axes.plot(range(len(shares)), shares, color=SERIES[0], marker="o", markersize=4)
        if len(shares) <= 24:
            for at, share in enumerate(shares):
                axes.annotate(f"{share:.1f}", (at, share), (0, 5), **_ABOVE)
        axes.set_ylim(0, min(112.0, max(1.0, 1.25 * max(shares))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}%"))
        axes.set_title("Fraction of the bank in use after each task", pad=10)
        _task_axis(axes, [task.task for task in capacity])
        return png_bytes(figure)


def _modes(results: Results) -> list[tuple[str, Mode]]:
    pairs = (("TIL (task given)", results.til), ("TaIL (task inferred)", results.tail))
    return [(name, mode) for name, mode in pairs if mode is not None]


def _points(base: Sequence[float | None] | None, mode: Mode, task: int) -> tuple[list[int], list[float]]:
    column = [None if base is None else base[task], *(row[task] for row in mode.matrix)]
    # nan leaves a gap in the line where there is no score
    return list(range(len(column))), [math.nan if score is None else score for score in column]


def _task_axis(axes: Axes, tasks: Sequence[str]) -> None:
    step = max(1, math.ceil(len(tasks) / 40))
    names = [label(task) for task in tasks[::step]]
    axes.set_xticks(range(0, len(tasks), step), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)


def _cycle(count: int) -> list[str]:
    return [SERIES[at % len(SERIES)] for at in range(count)]
