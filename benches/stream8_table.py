"""The table of benches/stream8.py's rows, and how far moses lies above the line that the per-task points draw.

    python benches/stream8_table.py [--method moses]

The line is piecewise linear in bytes through the per-task adapters that no cheaper one beats. The difference at equal bytes is of the
same items and seeds: per item, moses' mark less the marks of the two neighbours on the line, weighted as the line weighs them. Its 95%
interval is by a bootstrap over the items of each task (10,000 draws), seeds being averaged before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DRAWS = 10_000


def marks(row: dict[str, Any], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Right or wrong, (items,) of 0 and 1, a task."""
    return {
        task: np.array(list(f"{int(text, 16):0{sizes[task]}b}"), dtype=float) for task, text in row["items"].items()
    }


def mean_marks(rows: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    found = [marks(row, sizes) for row in rows]
    return {task: np.mean([one[task] for one in found], axis=0) for task in found[0]}


def envelope(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """(bytes, op, method) ascending, without points that a cheaper one beats."""
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def main() -> None:
    """Print the table, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="moses")
    parser.add_argument("--stream", type=Path, default=Path("../shared/data/stream8"))
    arguments = parser.parse_args()
    rows = json.loads((HERE / "results" / "stream8.json").read_text())
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    tasks = list(rows[0]["items"])
    sizes = {task: len(json.loads((arguments.stream / task / "test.json").read_text())) for task in tasks}
    print("| method | seeds | OP (range) | BWT | TaIL OP | bytes | first task | last task | used weights shared |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for method, found in by_method.items():
        ops = [row["op"] for row in found]
        shared = found[0]["shared_fraction"]
        print(
            f"| {method} | {len(found)} | {np.mean(ops):.2f} ({min(ops):.2f} to {max(ops):.2f}) | {np.mean([r['bwt'] for r in found]):.2f} "
            f"| {np.mean([r['tail_op'] for r in found]):.2f} | {np.mean([r['bytes'] for r in found]):,.0f} "
            f"| {np.mean([r['first_bytes'] for r in found]):,.0f} | {np.mean([r['last_bytes'] for r in found]):,.0f} "
            f"| {'' if shared is None else f'{100 * shared:.0f}%'} |"
        )
    ours = by_method[arguments.method]
    seeds = {row["seed"] for row in ours}
    rivals = {
        method: [row for row in found if row["seed"] in seeds]
        for method, found in by_method.items()
        if method.startswith("per-task")
    }
    rivals = {method: found for method, found in rivals.items() if len(found) == len(ours)}
    points = [
        (float(np.mean([r["bytes"] for r in found])), float(np.mean([r["op"] for r in found])), method)
        for method, found in rivals.items()
    ]
    line, size = envelope(points), float(np.mean([row["bytes"] for row in ours]))
    lower = [point for point in line if point[0] <= size]
    upper = [point for point in line if point[0] > size]
    if not lower:
        print(
            f"\n{arguments.method} at {size:,.0f} bytes is cheaper than every per-task adapter measured; the next is {upper[0][2]}."
        )
        weights = {upper[0][2]: 1.0}
    elif not upper:
        weights = {lower[-1][2]: 1.0}
    else:
        share = (size - lower[-1][0]) / (upper[0][0] - lower[-1][0])
        weights = {lower[-1][2]: 1.0 - share, upper[0][2]: share}
    mine = mean_marks(ours, sizes)
    theirs = {method: mean_marks(rivals[method], sizes) for method in weights}
    differences = {
        task: mine[task] - sum(weight * theirs[method][task] for method, weight in weights.items()) for task in tasks
    }
    generator = np.random.default_rng(0)
    draws = np.mean(
        [100 * d[generator.integers(len(d), size=(DRAWS, len(d)))].mean(1) for d in differences.values()],
        axis=0,
    )
    found = 100 * float(np.mean([d.mean() for d in differences.values()]))
    low, high = np.percentile(draws, [2.5, 97.5])
    against = " + ".join(f"{weight:.2f} x {method}" for method, weight in weights.items())
    print(
        f"\n{arguments.method} at {size:,.0f} bytes, seeds {sorted(seeds)}: {found:+.2f} points to {against}, 95% from {low:+.2f} to {high:+.2f}."
    )
    best = max(points, key=lambda point: point[1])
    print(f"The best per-task adapter is {best[2]}, {best[1]:.2f} at {best[0]:,.0f} bytes.")


if __name__ == "__main__":
    main()
