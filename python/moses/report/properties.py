"""The six properties of lifelong learning, each with the number that backs it and the command that made it.

Knowledge retention, forward transfer, backward transfer, online learning, no task boundaries, fixed capacity: the desiderata of
Biesialska et al. (COLING 2020, arXiv 2012.09823). What a run did not measure says so; nothing is inferred from the method's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moses.report.results import Mode, Results
from moses.report.text import format_bytes, format_score, format_share

NOT_MEASURED = "not measured"
NAMES = (
    "knowledge retention",
    "forward transfer",
    "backward transfer",
    "online learning",
    "no task boundaries",
    "fixed capacity",
)
HEAD = ("property", "measured", "how")


@dataclass(frozen=True, slots=True)
class Property:
    """One property of one run.

    Attributes:
        name: one of `NAMES`.
        value: the number; None is not measured.
        shown: the number with its unit, or why there is none.
        how: what the number is.
    """

    name: str
    value: float | None
    shown: str
    how: str

    def as_dict(self) -> dict[str, object]:
        """The property for JSON."""
        return asdict(self)


def properties(results: Results) -> tuple[Property, ...]:
    """The six properties of a run, in the order of `NAMES`."""
    mode = results.til or results.tail
    return (
        _retention(results, mode),
        _measure(
            results,
            mode,
            "fwt",
            "forward transfer",
            "score of a later task before it is trained, less the base model's",
        ),
        _measure(
            results,
            mode,
            "bwt",
            "backward transfer",
            "score of an earlier task at the end, less that just after its own",
        ),
        _online(results, mode),
        _boundaries(results),
        _capacity(results),
    )


def command_of(results: Results) -> str:
    """The command that made a run, with the run's name left open."""
    return results.command or "not known: the results are of an earlier moses"


def _retention(results: Results, mode: Mode | None) -> Property:
    name = NAMES[0]
    value = None if mode is None else mode.metrics.get("forgetting")
    if value is None or mode is None:
        return _missing(name, "forgetting of earlier tasks, which needs two tasks and all rows of the matrix")
    how = "forgetting: the best score of each earlier task less its last, mean"
    if not results.lower_is_better:
        return Property(name, value, f"{format_score(value)} points lost", how)
    lost = [_ratio(mode.matrix[-1][at], row[at]) for at, row in enumerate(mode.matrix[:-1])]
    known = [ratio for ratio in lost if ratio is not None]
    worst = f", worst task {100 * max(known):+.1f}% since its own stage" if known else ""
    return Property(
        name, value, f"{_plain(value)} perplexity lost{worst}", how.replace("less its last", "from its last")
    )


def _measure(results: Results, mode: Mode | None, key: str, name: str, how: str) -> Property:
    value = None if mode is None else mode.metrics.get(key)
    if value is None:
        return _missing(name, how)
    if results.lower_is_better:
        good = "better" if value < 0 else "worse" if value > 0 else "the same"
        return Property(name, value, f"{_plain(value, sign=True)} perplexity ({good})", f"{how}; below 0 is better")
    return Property(name, value, f"{value + 0.0:+.1f} points", how)


def _online(results: Results, mode: Mode | None) -> Property:
    name, how = NAMES[3], "mean score over all tasks at the end, every example having been read once"
    training = results.config.get("train_config")
    epochs = training.get("epochs") if isinstance(training, Mapping) else None
    value = None if mode is None else mode.metrics.get("op")
    if value is None or (epochs != 1 and not results.online):
        why = f" (this run read them {epochs} times)" if isinstance(epochs, int) and epochs > 1 else ""
        return _missing(name, how + why)
    shown = f"perplexity {_plain(value)}" if results.lower_is_better else format_score(value)
    return Property(name, value, f"{shown} after one pass", how)


def _boundaries(results: Results) -> Property:
    name, how = NAMES[4], "changes of domain that were found in a stream without boundaries, and false alarms"
    score = results.online.get("score")
    if not isinstance(score, Mapping):
        return _missing(name, how)
    delays, alarms, returns = score.get("found"), _count(score.get("false_alarms")), score.get("returns")
    if not isinstance(delays, list) or not delays:
        return _missing(name, how)
    found = [delay for delay in map(_count, delays) if delay is not None]
    parts = [f"{len(found)} of {len(delays)} changes found"]
    if found:
        parts.append(f"within {max(found)} sequences")
    if alarms is not None:
        parts.append(f"{alarms} false alarms")
    if isinstance(returns, list) and returns:
        parts.append(f"{sum(one is True for one in returns)} of {len(returns)} returning domains recognised")
    return Property(name, len(found) / len(delays), ", ".join(parts), how)


def _capacity(results: Results) -> Property:
    name = NAMES[5]
    limit = _count(results.budget.get("limit"))
    used = results.budget.get("used")
    if limit is not None and isinstance(used, Sequence) and used and all(_count(one) is not None for one in used):
        most = max(used)
        share = most / limit if limit else math.inf
        shown = f"{format_bytes(most)} of {format_bytes(limit)} ({format_share(share)}) at most"
        return Property(name, float(most), shown, "bytes that the tasks took, the most at any time, of the budget")
    how = "bytes that each task after the first added to the run, mean, and as a share of the first's; no budget was given"
    sizes = [task.total_bytes for task in results.capacity]
    if len(sizes) < 2:
        return _missing(name, how)
    mean = sum(sizes[1:]) / len(sizes[1:])
    share_of = f" ({format_share(mean / sizes[0])} of the first)" if sizes[0] else ""
    return Property(name, mean, f"{format_bytes(round(mean))} a task{share_of}", how)


def _missing(name: str, how: str) -> Property:
    return Property(name, None, NOT_MEASURED, how)


def _ratio(last: float | None, own: float | None) -> float | None:
    return None if last is None or not own else last / own - 1.0


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _plain(value: float, sign: bool = False) -> str:
    text = f"{value + 0.0:+.2f}" if sign else f"{value + 0.0:.2f}"
    return text.lstrip("+-") if float(text) == 0.0 else text
