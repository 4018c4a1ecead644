"""Heat maps: transfer matrices, mask overlap, confusion of the task identifier, expert use. Each is a PNG as bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.patches import Rectangle

from moses.report.canvas import INK, MUTED, label, new_figure, plain_axes, png_bytes, style
from moses.report.results import Mode, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NUMBERED = 24
"""Cells of a larger map are too small for numbers; the page has them in its tables."""

MAX_PANELS = 24
"""Panels of a picture that shows a panel a task."""

_COLOURS = "YlGnBu"


def transfer_matrix(results: Results, mode: Mode, title: str) -> bytes:
    """R as a heat map: a row a state of the model (the base model first), a column a task, the diagonal framed."""
    rows: list[Sequence[float | None]] = [] if results.base is None else [results.base]
    names = [] if results.base is None else ["base model"]
    first = len(rows)
    rows += mode.matrix
    names += [f"after {label(task)}" for task in results.tasks[: len(mode.matrix)]]
    framed = {(first + at, at) for at in range(len(mode.matrix))}
    texts = [[None if score is None else f"{score:.1f}" for score in row] for row in rows]
    values = [[None if score is None else score / 100 for score in row] for row in rows]
    if results.lower_is_better:
        values = _depths(rows)
    return _heat_map(
        values, texts, names, [label(task) for task in results.tasks], title, framed, gap_after_first=first == 1
    )


def _depths(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Perplexities as colours from 0 (the worst of the matrix) to 1 (the best), by their logarithms."""
    logs = [[None if score is None else math.log(max(score, 1e-9)) for score in row] for row in rows]
    known = [value for row in logs for value in row if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    width = (high - low) or 1.0
    return [[None if value is None else (high - value) / width for value in row] for row in logs]


def overlap_map(tasks: Sequence[str], overlap: Sequence[Sequence[int]]) -> bytes:
    """For each task (row) the share of its weights that another task (column) uses too."""
    values = [[cell / row[at] if row[at] else None for cell in row] for at, row in enumerate(overlap)]
    texts = [[None if value is None else f"{100 * value:.0f}%" for value in row] for row in values]
    names = [label(task) for task in tasks]
    return _heat_map(values, texts, names, names, "Share of the row's weights that the column uses too")


def confusion_map(results: Results, confusion: Sequence[Sequence[int]]) -> bytes:
    """Which task (column) the prompts of a task (row) were taken for: counts, coloured by their share of the row."""
    values = [[cell / sum(row) if sum(row) else None for cell in row] for row in confusion]
    texts = [[str(cell) if sum(row) else None for cell in row] for row in confusion]
    names = [label(task) for task in results.tasks]
    framed = {(at, at) for at in range(len(names))}
    return _heat_map(values, texts, names, [*names, "unknown"], "Prompts of the row's task, by inferred task", framed)


def expert_use(results: Results) -> bytes:
    """A panel a task: the share of tokens (colour) that each expert (column) of each layer (row) got."""
    tasks = [task for task in results.tasks if results.expert_use.get(task)][:MAX_PANELS]
    layers = list(dict.fromkeys(layer for task in tasks for layer in results.expert_use[task]))
    width = max(len(shares) for task in tasks for shares in results.expert_use[task].values())
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    panel_height = min(4.5, max(1.3, 0.14 * len(layers) + 0.6))
    panel_width = min(3.2, max(1.7, 0.28 * width + 0.6))
    with style():
        figure = new_figure(panel_width * columns + 1.9, panel_height * rows + 0.3)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for at, panel in enumerate(panels.flat):
            if at >= len(tasks):
                panel.set_visible(False)
                continue
            use = results.expert_use[tasks[at]]
            grid = [[*use.get(layer, ()), *[math.nan] * (width - len(use.get(layer, ())))] for layer in layers]
            image = panel.imshow(grid, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_title(label(tasks[at], max(12, int(panel_width * 10))), fontsize=9)
            plain_axes(panel)
            few = width <= 16
            panel.set_xticks(
                range(width) if few else [0, width - 1], [str(n) for n in (range(width) if few else (0, width - 1))]
            )
            shown = range(0, len(layers), max(1, math.ceil(len(layers) / 16)))
            panel.set_yticks(list(shown), [label(layers[n]) for n in shown], fontsize=7)
        figure.supxlabel("expert", fontsize=9)
        figure.colorbar(image, ax=panels, label="share of tokens", shrink=0.8, aspect=30)
        return png_bytes(figure)


def _heat_map(
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str | None]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
    framed: Set[tuple[int, int]] = frozenset(),
    gap_after_first: bool = False,
) -> bytes:
    """`values` from 0 to 1 give the colour; a cell without a value is hatched; the cells of `framed` are framed."""
    num_rows, num_columns = len(row_names), len(column_names)
    numbered = max(num_rows, num_columns) <= MAX_NUMBERED
    cell_width, cell_height = (0.62, 0.4) if numbered else (min(0.3, 12 / num_columns), min(0.24, 12 / num_rows))
    gap = 0.25 if gap_after_first and num_rows > 1 else 0.0
    tops = [at + (gap if at else 0.0) for at in range(num_rows)]
    with style():
        figure = new_figure(max(4.6, cell_width * num_columns + 2.4), cell_height * num_rows + 1.5)
        axes = figure.add_subplot()
        _paint(axes, values, tops, edge=1.0 if numbered else 0.2)
        if numbered:
            _number(axes, values, texts, tops, framed)
        for at, column in sorted(framed):
            corner = (column + 0.03, tops[at] + 0.03)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1.1 if numbered else 0.5))
        axes.set_xlim(0, num_columns)
        axes.set_ylim(num_rows + gap, 0)
        plain_axes(axes)
        step = max(1, math.ceil(max(num_columns, num_rows) / 60))
        places = [at + 0.5 for at in range(0, num_columns, step)]
        axes.set_xticks(places, column_names[::step], rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks([top + 0.5 for top in tops[::step]], row_names[::step])
        if not numbered:
            axes.tick_params(labelsize=6)
        axes.set_title(title, color=INK, pad=10)
        if any(value is None for row in values for value in row):
            figure.supxlabel("hatched: no score", fontsize=7.5, color=MUTED, x=0.99, ha="right")
        return png_bytes(figure)


def _paint(axes: Axes, values: Sequence[Sequence[float | None]], tops: Sequence[float], edge: float) -> None:
    """Colour the cells; where a cell has no value the hatched ground is seen."""
    look: dict[str, Any] = {
        "facecolor": "white",
        "edgecolor": "#cbd2d9",
        "hatch": "////",
        "linewidth": 0.5,
        "zorder": 0,
    }
    for at, row in enumerate(values):
        if None in row:
            axes.add_patch(Rectangle((0, tops[at]), len(row), 1, **look))
        cells = [[math.nan if value is None else value for value in row]]
        edges = (list(range(len(row) + 1)), [tops[at], tops[at] + 1])
        axes.pcolormesh(*edges, cells, cmap=_COLOURS, vmin=0, vmax=1, edgecolors="white", linewidth=edge, zorder=1)


def _number(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str | None]],
    tops: Sequence[float],
    framed: Set[tuple[int, int]],
) -> None:
    """Write the numbers into the cells, dark on light and light on dark."""
    for at, row in enumerate(values):
        for column, value in enumerate(row):
            text = texts[at][column]
            if value is None or text is None:
                continue
            red, green, blue, _ = colormaps[_COLOURS](min(max(value, 0.0), 1.0))
            ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
            weight = "bold" if (at, column) in framed else "normal"
            where = (column + 0.5, tops[at] + 0.5)
            axes.text(*where, text, ha="center", va="center", color=ink, fontsize=8.5, fontweight=weight)
