"""Plan, gather and combine on a CUDA device, against torch's ways, a sort as megablocks does, and the device's copy bandwidth.

    python benches/gpu.py [--rounds 20]

A time is of CUDA events around one call, with the second cache overwritten before it; systems take turns within a round; medians with the
smallest and largest. The limit is the bytes that have to be read and written at the bandwidth of `copy_` of 1 GiB, both directions counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moses

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PLANS = [
    (tokens, top_k, experts)
    for tokens in (4_096, 65_536, 1_048_576)
    for top_k in (1, 2, 8)
    for experts in (8, 64, 512, 4_096)
]
ROWS = [(65_536, 1_024), (16_384, 4_096), (65_536, 1_023)]
TOP_K, EXPERTS = 2, 64

Calls = dict[str, Callable[[], Any]]


def plan_calls(ids: torch.Tensor, experts: int) -> Calls:
    """The plan by each system."""
    flat, narrow = ids.view(-1), ids.view(-1).int()

    def by_torch() -> Any:
        order = torch.argsort(flat, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(flat.shape[0], device=flat.device))
        return order, inverse, torch.bincount(flat, minlength=experts).cumsum(0)

    def by_sort() -> Any:
        # megablocks: a radix sort of int32 ids, a histogram and its sum; no inverse
        _, order = torch.sort(narrow, stable=True)
        return order, torch.histc(narrow, experts, 0, experts - 1).cumsum(0)

    return {"moses": lambda: moses.dispatch_plan(ids, experts), "torch": by_torch, "sort": by_sort}


def row_calls(tokens: int, width: int, dtype: torch.dtype) -> tuple[Calls, dict[str, int]]:
    """Gather and combine by each system, with their gradients by ours, and the bytes that each has to move."""
    plan = moses.dispatch_plan(torch.randint(EXPERTS, (tokens, TOP_K), device="cuda"), EXPERTS)
    x, weights = torch.randn(tokens, width, device="cuda").to(dtype), torch.rand(tokens, TOP_K, device="cuda")
    y = moses.ops.gather(x, plan)
    token, inverse = plan.order.long() // TOP_K, plan.inverse.long().view(tokens, TOP_K)
    flat, like = weights.flatten()[plan.order.long()].to(dtype), weights.to(dtype)
    rows, total, ops = torch.empty_like(y), torch.empty_like(x), torch.ops.moses
    return {
        "gather: moses": lambda: moses.ops.gather(x, plan),
        "gather: index_select": lambda: x.index_select(0, token),
        "gather: index_select(out=)": lambda: torch.index_select(x, 0, token, out=rows),
        "combine: moses": lambda: moses.ops.combine(y, plan, weights),
        "combine: gather, weigh, sum": lambda: (y[inverse] * like[..., None]).sum(1),
        "combine: index_add_": lambda: total.zero_().index_add_(0, token, y * flat[:, None]),
        "gather's gradient: moses": lambda: ops.gather_backward(y, plan.order, plan.inverse, TOP_K),
        "combine's gradient: moses": lambda: ops.combine_backward_y(x, plan.order, plan.inverse, weights),
        "weights' gradient: moses": lambda: ops.combine_backward_weights(x, y, plan.order, plan.inverse, TOP_K),
    }, dict.fromkeys(
        ("gather", "combine", "gather's gradient", "combine's gradient", "weights' gradient"), x.nbytes + y.nbytes
    )


def measure(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    cache = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for number in range(rounds + 3):  # the first rounds warm up
        for name, call in calls.items():
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 3:
                times[name].append(start.elapsed_time(end))
    return times


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second that `copy_` reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (times,) = measure({"copy_": lambda: target.copy_(source)}, rounds).values()
    return 2 * source.nbytes / statistics.median(times) * 1e3


def main() -> None:
    """Print the tables and write `results/gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        parser.exit(2, "benches/gpu.py needs a CUDA device\n")
    bandwidth, found = copy_bandwidth(rounds), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy_ {bandwidth / 1e9:.0f} GB/s\n")
    print("| what | system | ms (range) | times the limit |\n| --- | --- | --- | --- |")

    def report(what: str, calls: Calls, sizes: dict[str, int]) -> None:
        for name, times in measure(calls, rounds).items():
            middle, limit = statistics.median(times), sizes.get(name.split(":")[0], 0) / bandwidth * 1e3
            print(
                f"| {what} | {name} | {middle:.3f} ({min(times):.3f} to {max(times):.3f}) | {middle / limit:.2f} |",
                flush=True,
            )
            found.append({"what": what, "system": name, "ms": times, "limit_ms": limit})

    for tokens, top_k, experts in PLANS:
        ids = torch.randint(experts, (tokens, top_k), device="cuda")
        calls, size = plan_calls(ids, experts), ids.nbytes + 2 * 4 * ids.numel()
        report(f"plan {tokens:,} x {top_k}, {experts} experts", calls, dict.fromkeys(calls, size))
    for tokens, width in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            report(f"{tokens:,} x {width:,} {str(dtype)[6:]}, top-{TOP_K}", *row_calls(tokens, width, dtype))
    RESULTS.parent.mkdir(exist_ok=True)
    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_a_second": bandwidth}
    RESULTS.write_text(json.dumps({**environment, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
