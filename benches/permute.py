"""Gather and combine of 65,536 x 1,024 rows, top-2, against torch's ways; and their cost as experts become many.

    python benches/permute.py [--threads 1,2] [--rounds 5]

The limit is the bytes that have to be read and written at the machine's copy bandwidth, both directions counted, on as many threads. Systems take
turns within a round; times are medians, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from plan import copy_bandwidth, seconds

import moses

TOKENS, WIDTH, TOP_K = 65_536, 1_024, 2
RESULTS = Path(__file__).parent / "results" / "permute.json"


def calls_of(dtype, experts=64, tokens=TOKENS, width=WIDTH):
    """The systems by name, and the bytes of gather and combine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    plan = moses.dispatch_plan(torch.randint(experts, (tokens, TOP_K), generator=generator), experts)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    y = moses.ops.gather(x, plan).clone()
    token, inverse = plan.order.long() // TOP_K, plan.inverse.long().view(tokens, TOP_K)
    rows, total = torch.empty_like(y), torch.empty_like(x)
    flat = weights.flatten()[plan.order.long()].to(dtype)
    like, offsets = weights.to(dtype), torch.arange(0, tokens * TOP_K, TOP_K)
    return {
        "gather: moses": lambda: moses.ops.gather(x, plan),
        "gather: index_select(out=)": lambda: torch.index_select(x, 0, token, out=rows),
        "gather: index_select": lambda: x.index_select(0, token),
        "combine: moses": lambda: moses.ops.combine(y, plan, weights),
        "combine: gather, weigh, sum": lambda: (y[inverse] * like[..., None]).sum(1),
        "combine: index_add_": lambda: total.zero_().index_add_(0, token, y * flat[:, None]),
        "combine: embedding_bag": lambda: torch.nn.functional.embedding_bag(
            inverse.flatten(), y, offsets, mode="sum", per_sample_weights=like.flatten()
        ),
        "copy_ of the gathered rows": lambda: rows.copy_(y),
    }, {"gather": x.nbytes + y.nbytes, "combine": y.nbytes + x.nbytes}


def measure(calls, rounds):
    times = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            taken = seconds(call) * 1e3
            if number:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found = []
    print("| threads | dtype | what | ms (range) | times the limit |")
    print("| --- | --- | --- | --- | --- |")
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        bandwidth = copy_bandwidth()
        for dtype in (torch.float32, torch.bfloat16):
            calls, sizes = calls_of(dtype)
            for name, times in measure(calls, arguments.rounds).items():
                middle, limit = statistics.median(times), sizes.get(name.split(":")[0], 0) / bandwidth * 1e3
                of_limit = f"{middle / limit:.2f}" if limit else ""
                print(
                    f"| {threads} | {str(dtype)[6:]} | {name} | {middle:.1f} ({min(times):.1f} to {max(times):.1f}) | {of_limit} |",
                    flush=True,
                )
                found.append(
                    {
                        "threads": threads,
                        "dtype": str(dtype)[6:],
                        "what": name,
                        "ms": middle,
                        "range_ms": [min(times), max(times)],
                        "limit_ms": limit,
                    }
                )
    torch.set_num_threads(1)
    print("\n| E | plan ms | gather ms | combine ms |\n| --- | --- | --- | --- |")
    for experts in (8, 64, 512, 4096):
        ids = torch.randint(experts, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(0))
        calls, _ = calls_of(torch.float32, experts, width=256)
        chosen = {"plan": lambda ids=ids, experts=experts: moses.dispatch_plan(ids, experts)}
        chosen |= {name.split(":")[0]: call for name, call in calls.items() if name.endswith(": moses")}
        middle = {name: statistics.median(times) for name, times in measure(chosen, arguments.rounds).items()}
        print(f"| {experts} | {middle['plan']:.2f} | {middle['gather']:.2f} | {middle['combine']:.2f} |", flush=True)
        found.append({"threads": 1, "experts": experts, "width": 256, "ms": middle})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
