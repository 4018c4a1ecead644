"""The dispatch plan against torch and numpy at the same number of threads: a table as markdown, and JSON.

    python benches/plan.py [--threads 1,2] [--rounds 9] [--tokens 4096,65536,1048576]

torch's way is stable argsort, bincount and cumsum, numpy's the same by its names; neither makes the inverse, which ours has. The limit is the bytes
that have to be read and written (ids in, order and inverse out) at the machine's copy bandwidth, both directions counted, on as many threads.
Systems take turns within a round; times are medians, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moses

RESULTS = Path(__file__).parent / "results" / "plan.json"


def seconds(call: Callable[[], Any]) -> float:
    """One call, its result freed outside of the time."""
    start = time.perf_counter()
    result = call()
    taken = time.perf_counter() - start
    del result
    return taken


def by_torch(ids: torch.Tensor, experts: int) -> Any:
    flat = ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts).cumsum(0)


def by_numpy(ids: np.ndarray, experts: int) -> Any:
    flat = ids.ravel()
    return flat.argsort(kind="stable"), np.bincount(flat, minlength=experts).cumsum()


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 256 MiB into memory that is there."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(7))


def bar(pairs: int) -> int:
    return 15 if pairs >= 500_000 else 8 if pairs >= 60_000 else 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", default="4096,65536,1048576")
    arguments = parser.parse_args()
    rows = []
    print(
        "| threads | T x k | E | moses ms (range) | torch ms | numpy ms | times torch (bar) | times the limit | bytes a pair |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        bandwidth = copy_bandwidth()
        for tokens in map(int, arguments.tokens.split(",")):
            for top_k in (1, 2, 8):
                for experts in (8, 64, 512):
                    ids = torch.randint(experts, (tokens, top_k), generator=torch.Generator().manual_seed(0))
                    pairs, array = ids.numel(), ids.numpy()
                    calls = {
                        "moses": lambda ids=ids, experts=experts: moses.dispatch_plan(ids, experts),
                        "torch": lambda ids=ids, experts=experts: by_torch(ids, experts),
                        "numpy": lambda array=array, experts=experts: by_numpy(array, experts),
                    }
                    rounds = arguments.rounds if pairs < 1_000_000 else max(3, arguments.rounds // 3)
                    times: dict[str, list[float]] = {name: [] for name in calls}
                    for number in range(rounds + 1):  # the first warms up
                        for name, call in calls.items():
                            inner = max(1, 20_000 // pairs)
                            taken = statistics.median(seconds(call) for _ in range(inner))
                            if number:
                                times[name].append(taken * 1e3)
                    plan = calls["moses"]()
                    middle = {name: statistics.median(found) for name, found in times.items()}
                    limit = (ids.nbytes + plan.order.nbytes + plan.inverse.nbytes) / bandwidth * 1e3
                    row = {
                        "threads": threads,
                        "tokens": tokens,
                        "top_k": top_k,
                        "experts": experts,
                        **{f"{name}_ms": value for name, value in middle.items()},
                        "range_ms": [min(times["moses"]), max(times["moses"])],
                        "times_torch": middle["torch"] / middle["moses"],
                        "bar": bar(pairs),
                        "limit_ms": limit,
                        "times_limit": middle["moses"] / limit,
                        "bytes_a_pair": (ids.nbytes + plan.bytes) / pairs,
                        "bandwidth": bandwidth,
                    }
                    rows.append(row)
                    low, high = row["range_ms"]
                    print(
                        f"| {threads} | {tokens:,} x {top_k} | {experts} | {middle['moses']:.3f} ({low:.3f} to {high:.3f}) "
                        f"| {middle['torch']:.3f} | {middle['numpy']:.3f} | {row['times_torch']:.1f} ({row['bar']}) | {row['times_limit']:.1f} "
                        f"| {row['bytes_a_pair']:.1f} |",
                        flush=True,
                    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "numpy": np.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
