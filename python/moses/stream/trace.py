"""TRACE (Wang et al., arXiv 2310.06762): the order of its eight tasks and the measure of each.

The order is that of the paper's experiments (`scripts/` of BeyonderXX/TRACE), the measures are those of its
`evaluations/`. A download also holds a replay set (`Lima`), which is no task.
"""

from __future__ import annotations

TRACE_METRICS = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "accuracy",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
    "20Minuten": "sari",
}
"""Task name -> metric, in the paper's order."""


def trace_order(folders: list[str]) -> list[str]:
    """TRACE's tasks in the paper's order, then every other folder by name; only TRACE's where all eight are there."""
    known = [name for name in TRACE_METRICS if name in folders]
    if len(known) == len(TRACE_METRICS):
        return known
    return known + sorted(name for name in folders if name not in TRACE_METRICS)
