"""Pictures as PNG bytes: no display, no global state of matplotlib, the same bytes for the same numbers.

matplotlib is imported here and nowhere else at the top of a file, and this file only when a picture is drawn.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moses.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the first use on a machine is no news

DPI = 144
INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
SERIES = ("#2f6fb5", "#e07b39", "#3d9970", "#b5446e", "#8468b8", "#c2a01f", "#4aa3b5", "#8a6d5a")
"""Colours that stay apart for most kinds of colour blindness and on both kinds of print."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,  # a dollar in the name of a task is a dollar
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": "#9aa5b1",
    "hatch.linewidth": 0.6,
}


@contextmanager
def style() -> Iterator[None]:
    """The look of every picture, whatever the user's own settings are; letters that the font lacks are boxes."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """A white figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG, without the version of matplotlib and without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def label(name: str, limit: int = 22) -> str:
    """The name of a task or a layer, short enough for an axis; what is special about a name is usually at its end."""
    name = printable(name, 1000)
    head = limit * 2 // 5
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"


def plain_axes(axes: Axes) -> None:
    """No frame and no tick marks: for heat maps, whose cells are the frame."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
