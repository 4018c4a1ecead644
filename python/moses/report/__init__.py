"""Reports: a page and pictures of one run, a table of several. Made from results.json alone.

Names are imported when they are used: every command shows numbers by `moses.report.text`, and few make a report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moses.report.compare import compare_runs
    from moses.report.results import Results, read_results
    from moses.report.write import PAGE, PICTURES, draw_pictures, write_report

__all__ = ["PAGE", "PICTURES", "Results", "compare_runs", "draw_pictures", "read_results", "write_report"]

_LAZY = {
    "PAGE": "write",
    "PICTURES": "write",
    "Results": "results",
    "compare_runs": "compare",
    "draw_pictures": "write",
    "read_results": "results",
    "write_report": "write",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moses.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moses.report.{_LAZY[name]}"), name)
