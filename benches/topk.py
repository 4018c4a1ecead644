"""What the top-k of routers costs: `moses::topk` against torch.topk (which promises no order among equals) and the stable sort.

    python benches/topk.py [--rounds 7] [--threads 1]

Softmax scores in float32, interleaved in one process; medians, and ratios to torch.topk. `tied` has every row equal throughout, the worst
case of the repair. Prints a table and writes benches/results/topk.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from moses.routers.topk_of import stable_topk

HERE = Path(__file__).parent
CASES = (
    (65_536, 8, 2, False),
    (65_536, 64, 1, False),
    (65_536, 64, 2, False),
    (65_536, 64, 8, False),
    (65_536, 64, 8, True),
    (16_384, 256, 8, False),
    (4_096, 4_096, 8, False),
    (1_048_576, 64, 2, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("| T | E | k | scores | moses::topk ms | torch.topk ms | stable sort ms | ratio to torch.topk |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for tokens, experts, k, tied in CASES:
        generator = torch.Generator().manual_seed(0)
        scores = torch.zeros(tokens, experts) if tied else torch.randn(tokens, experts, generator=generator).softmax(-1)
        ways = {
            "moses": lambda scores=scores, k=k: torch.ops.moses.topk(scores, k),
            "torch": lambda scores=scores, k=k: scores.topk(k, dim=-1),
            "sort": lambda scores=scores: scores.sort(dim=-1, descending=True, stable=True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(max(2, arguments.rounds if tokens < 1_000_000 else arguments.rounds // 2)):
            for name, way in ways.items():
                if name == "sort" and tokens > 1_000_000:
                    continue  # seconds, and no news
                start = time.perf_counter()
                way()
                times[name].append(1000 * (time.perf_counter() - start))
        assert torch.equal(stable_topk(scores, k)[0], scores.topk(k, dim=-1).values)
        ratios = [mine / other for mine, other in zip(times["moses"], times["torch"], strict=True)]
        medians = {name: statistics.median(values) if values else None for name, values in times.items()}
        rows.append(
            {"T": tokens, "E": experts, "k": k, "tied": tied, "ms": medians, "ratio": statistics.median(ratios)}
            | {"low": min(ratios), "high": max(ratios)}
        )
        sort = "" if medians["sort"] is None else f"{medians['sort']:.1f}"
        print(
            f"| {tokens:,} | {experts:,} | {k} | {'tied' if tied else 'random'} | {medians['moses']:.1f} | {medians['torch']:.1f} | {sort} "
            f"| {rows[-1]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    result = {"cases": rows, "threads": arguments.threads, "rounds": arguments.rounds, "torch": torch.__version__}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "topk.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
