"""The page: one HTML file that needs nothing else, not even a script. Every text of a run is escaped here."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence, Set
from html import escape
from pathlib import Path
from typing import Any

from moses.report.properties import HEAD as PROPERTIES_HEAD
from moses.report.properties import command_of, properties
from moses.report.results import Mode, Results
from moses.report.text import format_bytes, format_score, format_share, printable

# nothing may be loaded from anywhere, so not even a name that slipped through could call out
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_MEASURES = {
    "op": ("OP", "mean score over all tasks at the end"),
    "avg": ("Avg", "mean over time of the mean score over the tasks learned so far"),
    "bwt": ("BWT", "what later tasks did to earlier ones; 0 is no forgetting"),
    "fwt": ("FWT", "what earlier tasks did for later ones, before these were trained"),
    "forgetting": ("Forgetting", "how much worse than the best score that each task ever had its last is"),
}
_SIGNS = {"bwt": "; above 0 is worse", "fwt": "; below 0 is better"}  # where a lower score is better


Cells = Set[tuple[int, int]]


def build_page(results: Results, name: str, pictures: Mapping[str, bytes]) -> str:
    """The page of a run called `name`; `pictures` are PNGs by file name, and a section without its picture says so."""
    sections = [
        _summary(results),
        _matrix("TIL: the task is given", "til-matrix.png", results, results.til, pictures),
        _matrix("TaIL: the task is inferred from the prompt", "tail-matrix.png", results, results.tail, pictures),
        _section("Score over time", "Each task's score after each training.", _picture("scores.png", pictures)),
        _capacity(results, pictures),
        _experts(results, pictures),
        _overlap(results, pictures),
        _confusion(results, pictures),
        _settings(results),
        _properties(results),
    ]
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)} · moses</title>\n<style>\n{style}</style>\n</head>\n"
    )
    return f"{head}<body>\n<h1>{_text(name)}</h1>\n{''.join(sections)}</body>\n</html>\n"


def _summary(results: Results) -> str:
    til, tail = results.til, results.tail
    done = max((len(mode.matrix) for mode in (til, tail) if mode), default=0)
    state = (
        f"{len(results.tasks)} tasks"
        if done == len(results.tasks)
        else f"{done} of {len(results.tasks)} tasks trained so far"
    )
    tiles = []
    for short, mode in (("TIL", til), ("TaIL", tail)):
        if mode is not None:
            tiles.append((f"OP, {short}", format_score(mode.metrics.get("op"))))
            tiles.append((f"BWT, {short}", format_score(mode.metrics.get("bwt"))))
    if tail is not None and tail.task_accuracy is not None:
        tiles.append(("task inferred right", f"{format_score(tail.task_accuracy)}%"))
    if results.capacity:
        tiles.append(("bytes added", format_bytes(sum(task.total_bytes for task in results.capacity))))
        if results.capacity[-1].bank_fraction is not None:
            tiles.append(("of the bank in use", format_share(results.capacity[-1].bank_fraction)))
    cards = "".join(f"<li><b>{_text(value)}</b><span>{_text(title)}</span></li>" for title, value in tiles)
    modes = [(short, mode) for short, mode in (("TIL", til), ("TaIL", tail)) if mode is not None]
    measures = [
        [
            f"{title}: {what}{_SIGNS.get(key, '') if results.lower_is_better else ''}",
            *(format_score(mode.metrics.get(key)) for _, mode in modes),
        ]
        for key, (title, what) in _MEASURES.items()
    ]
    model = results.config.get("model")
    path = model.get("source") if isinstance(model, dict) else None
    of_model = f" · model <bdi>{_text(path)}</bdi>" if path is not None else ""
    line = (
        f'<p class="quiet">method <bdi>{_text(results.method)}</bdi>{of_model} · {state} · {results.score_name}</p>\n'
    )
    return f'{line}<ul class="tiles">{cards}</ul>\n' + _table(["measure", *(short for short, _ in modes)], measures)


def _matrix(title: str, picture: str, results: Results, mode: Mode | None, pictures: Mapping[str, bytes]) -> str:
    if mode is None:
        return _section(title, "Not evaluated in this mode.")
    rows: list[list[str]] = []
    if results.base is not None:
        rows.append(["base model", *(format_score(score) for score in results.base)])
    first = len(rows)
    rows += [
        [f"after {task}", *(format_score(score) for score in row)]
        for task, row in zip(results.tasks, mode.matrix, strict=False)
    ]
    framed = {(first + at, at + 1) for at in range(len(mode.matrix))}
    lead = "Each row is the model after one more task, each column a task; framed: the one just trained."
    return _section(
        title, lead + _metric_names(results), _picture(picture, pictures), _numbers(["", *results.tasks], rows, framed)
    )


def _metric_names(results: Results) -> str:
    names: dict[str, list[str]] = {}
    for task in results.tasks:
        if task in results.task_metrics:
            names.setdefault(results.task_metrics[task], []).append(task)
    if len(names) == 1:
        return f" The score is {next(iter(names))}."
    parts = [f"{name} for {', '.join(tasks)}" for name, tasks in names.items()]
    return f" The score is {'; '.join(parts)}." if parts else ""


def _capacity(results: Results, pictures: Mapping[str, bytes]) -> str:
    if not results.capacity:
        return _section("Capacity", "Nothing is known about bytes in this run.")
    kinds = list(dict.fromkeys(kind for task in results.capacity for kind in task.bytes))
    rows = [
        [
            task.task,
            *(str(task.bytes.get(kind, 0)) for kind in kinds),
            str(task.total_bytes),
            format_share(task.bank_fraction),
        ]
        for task in results.capacity
    ]
    totals = [sum(task.bytes.get(kind, 0) for task in results.capacity) for kind in kinds]
    rows.append(["all tasks", *map(str, totals), str(sum(totals)), format_share(results.capacity[-1].bank_fraction)])
    lead = "Every byte that a task added to the run, by kind, and the fraction of the bank that some task uses."
    table = _numbers(["task", *kinds, "sum (bytes)", "bank in use"], rows)
    if results.similar:
        pairs = ", ".join(f"{task} from {other}" for task, other in results.similar.items())
        lead += f" Started from a similar task: {pairs}."
    return _section("Capacity", lead, _picture("bytes.png", pictures), _picture("bank.png", pictures), table)


def _experts(results: Results, pictures: Mapping[str, bytes]) -> str:
    title = "Expert use by task"
    if not results.expert_use:
        return _section(title, "This method has no experts, or their use was not counted.")
    rows = [
        [task, layer, *(format_share(share) for share in shares)]
        for task, layers in results.expert_use.items()
        for layer, shares in layers.items()
    ]
    width = max((len(row) for row in rows), default=2) - 2
    lead = "The share of tokens that each expert of each layer got, for every task."
    table = _numbers(["task", "layer", *(f"expert {number}" for number in range(width))], rows)
    return _section(title, lead, _picture("experts.png", pictures), table)


def _overlap(results: Results, pictures: Mapping[str, bytes]) -> str:
    title = "Mask overlap between tasks"
    if not results.overlap:
        return _section(title, "This method has no masks.")
    names = overlap_tasks(results)
    rows = [[task, *map(str, row)] for task, row in zip(names, results.overlap, strict=True)]
    framed = {(at, at + 1) for at in range(len(names))}
    lead = "How much of its weights a task shares with another. In the table: bytes, on the diagonal all that it uses."
    return _section(title, lead, _picture("overlap.png", pictures), _numbers(["", *names], rows, framed))


def overlap_tasks(results: Results) -> list[str]:
    """The names along the overlap's sides: those of the tasks, or numbers where there are more of them."""
    count = len(results.overlap or ())
    return list(results.tasks[:count]) if count <= len(results.tasks) else [f"task {at}" for at in range(count)]


def _confusion(results: Results, pictures: Mapping[str, bytes]) -> str:
    title = "Which task is it? Confusion of the task identifier"
    confusion = None if results.tail is None else results.tail.confusion
    if confusion is None:
        return _section(title, "No task was inferred in this run.")
    rows = [[task, *map(str, row)] for task, row in zip(results.tasks, confusion, strict=True)]
    framed = {(at, at + 1) for at in range(len(rows))}
    lead = "Test prompts of each task (row) by the task that they were taken for (column), after the last training."
    table = _numbers(["", *results.tasks, "unknown"], rows, framed)
    return _section(title, lead, _picture("confusion.png", pictures), table)


def _settings(results: Results) -> str:
    parts = []
    seconds = {name: f"{value:.1f} s" for name, value in results.seconds.items()}
    for title, values in (("Time", seconds), ("Configuration", results.config), ("Environment", results.environment)):
        if values:
            rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in values.items()]
            parts.append(f"<details><summary>{title}</summary>{_table(['', ''], rows, kind='text')}</details>\n")
    return _section("Settings", "What this run was made with.", *parts)


def _properties(results: Results) -> str:
    rows = [[found.name, found.shown, found.how] for found in properties(results)]
    lead = "The six properties of lifelong learning, each with the number of this run that backs it."
    command = f"<p>Made by <code>{_text(command_of(results))}</code></p>\n"
    return _section("Lifelong-learning properties", lead, _table(PROPERTIES_HEAD, rows, kind="text"), command)


def _section(title: str, lead: str, *parts: str) -> str:
    return f"<h2>{_text(title)}</h2>\n<p>{_text(lead)}</p>\n{''.join(parts)}"


def _picture(name: str, pictures: Mapping[str, bytes]) -> str:
    if name not in pictures:
        return '<p class="quiet">There is nothing to draw yet.</p>\n'
    data = base64.b64encode(pictures[name]).decode("ascii")
    alt = f"{name.removesuffix('.png')}: the numbers are in the table"
    return f'<figure><img alt="{_text(alt)}" src="data:image/png;base64,{data}"></figure>\n'


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]], framed: Cells = frozenset()) -> str:
    return f"<details><summary>the numbers</summary>{_table(head, rows, framed)}</details>\n"


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    framed: Cells = frozenset(),
    kind: str = "",
) -> str:
    def cell(row: int, column: int, value: str) -> str:
        if column == 0:
            return f'<th scope="row"><bdi>{_text(value)}</bdi></th>'
        look = "own" if (row, column) in framed else kind
        return f'<td class="{look}"><bdi>{_text(value)}</bdi></td>' if look else f"<td><bdi>{_text(value)}</bdi></td>"

    top = "".join(f'<th scope="col"><bdi>{_text(title)}</bdi></th>' for title in head)
    cells = ((cell(at, column, value) for column, value in enumerate(row)) for at, row in enumerate(rows))
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in cells)
    above = f"<thead><tr>{top}</tr></thead>\n" if any(head) else ""
    return f'<div class="scroll"><table>\n{above}<tbody>\n{body}</tbody>\n</table></div>\n'


def _text(value: Any) -> str:
    return escape(printable(value, 2000), quote=True)
