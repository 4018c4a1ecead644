"""What experts cost against a dense FFN of the same arithmetic, forward and backward: tables as markdown, and JSON.

    python benches/moe_ffn.py [--threads 1,2] [--dtypes float32,bfloat16] [--shapes 16x1024,16x2048,256x256] [--rounds 7] [--batches fresh,same]

T = 4,096 tokens, D = 512, SwiGLU, the gradient of the input and of every weight. A shape is experts x width; a token uses 2 experts, and 8 of
256. "dense" is gate, up and down of width k·F as three linear maps, or with gate and up in one: ratios are to the faster. "eager" and
"grouped_mm" are transformers' Mixtral block with those experts implementations, "moses" the same block with ours, "MoELayer" our own layer.
Systems take turns within a round; times are medians over rounds, with the smallest and largest. Batches are "fresh", a new one each round, as
in training (an expert's number of rows differs, and oneDNN builds kernels for shapes that it has not seen), or the "same" one. Ratios are
medians of the ratio to dense within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import moses
import moses.transformers

TOKENS, D = 4096, 512
TOP_K = {256: 8}  # 2 for the others
BARS = {"float32": 1.15, "bfloat16": 1.25}
MANY_BAR = 1.4
WARM_UP = 2  # rounds that are not counted
SLOW = {256: ("eager",)}  # takes half a minute: one round
RESULTS = Path(__file__).parent / "results" / "moe_ffn.json"


class Dense(nn.Module):
    def __init__(self, width, joint):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(D, wide, bias=False) for wide in ([2 * width] if joint else [width, width]))
        self.down = nn.Linear(width, D, bias=False)

    def forward(self, x):
        gate, up = self.into[0](x).chunk(2, -1) if len(self.into) == 1 else (into(x) for into in self.into)
        return self.down(F.silu(gate) * up)


def block(implementation, experts, top_k, width):
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    made = MixtralSparseMoeBlock(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    return made


def systems(experts, top_k, width, dtype):
    made = {"dense": Dense(top_k * width, False), "dense, joint": Dense(top_k * width, True)}
    made |= {name: block(name, experts, top_k, width) for name in ("eager", "grouped_mm", "moses")}
    made["MoELayer"] = moses.MoELayer(D, width, experts, top_k)
    return {name: module.to(dtype) for name, module in made.items()}


def step(module, x, upper):
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    started = time.perf_counter()
    y = module(x)
    (y[0] if isinstance(y, tuple) else y).backward(upper)
    return time.perf_counter() - started


def measure(experts, width, dtype, threads, rounds, batches):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    top_k = TOP_K.get(experts, 2)
    made = systems(experts, top_k, width, dtype)
    inputs = [torch.randn(1, TOKENS, D).to(dtype) for _ in range(rounds + WARM_UP if batches == "fresh" else 1)]
    upper = torch.randn(1, TOKENS, D).to(dtype)
    seconds = {name: [] for name in made}
    for number in range(-WARM_UP, rounds):
        for name, module in made.items():
            if name in SLOW.get(experts, ()) and number != 0:
                continue
            spent = step(module, inputs[number + WARM_UP if batches == "fresh" else 0], upper)
            if number >= 0:
                seconds[name].append(spent)
            module.zero_grad(set_to_none=True)
    best = min(("dense", "dense, joint"), key=lambda name: statistics.median(seconds[name]))
    rows = {}
    for name, found in seconds.items():
        milliseconds = [1e3 * value for value in found]
        ratios = [value / base for value, base in zip(found, seconds[best], strict=False)]
        rows[name] = {
            "median_ms": round(statistics.median(milliseconds), 1),
            "min_ms": round(min(milliseconds), 1),
            "max_ms": round(max(milliseconds), 1),
            "to_dense": round(statistics.median(ratios), 3),
        }
    return {
        "experts": experts,
        "width": width,
        "top_k": top_k,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "rounds": rounds,
        "batches": batches,
        "bar": MANY_BAR if experts == 256 else BARS[str(dtype).removeprefix("torch.")],
        "dense": best,
        "systems": rows,
    }


def table(results):
    names = list(results[0]["systems"])
    lines = [
        "| E, F, k | dtype | threads | batches | "
        + " | ".join(names)
        + " | moses to dense | MoELayer to dense | bar |",
        "| --- " * (7 + len(names)) + "|",
    ]
    for found in results:
        rows = found["systems"]
        cells = [f"{rows[n]['median_ms']:.0f} ({rows[n]['min_ms']:.0f} to {rows[n]['max_ms']:.0f})" for n in names]
        head = f"| {found['experts']}, {found['width']}, {found['top_k']} | {found['dtype']} | {found['threads']} | {found['batches']} | "
        tail = f" | {rows['moses']['to_dense']:.2f} | {rows['MoELayer']['to_dense']:.2f} | {found['bar']} |"
        lines.append(head + " | ".join(cells) + tail)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--shapes", default="16x1024,16x2048,256x256")
    parser.add_argument("--batches", default="fresh,same")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = []
    for shape in args.shapes.split(","):
        experts, width = map(int, shape.split("x"))
        for dtype in args.dtypes.split(","):
            for threads in map(int, args.threads.split(",")):
                for batches in args.batches.split(","):
                    found = measure(experts, width, getattr(torch, dtype), threads, args.rounds, batches)
                    results.append(found)
                    print(table([found]).splitlines()[-1], flush=True)
    print(f"\nmilliseconds, median (smallest to largest) of {args.rounds} rounds\n\n{table(results)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    args.out.write_text(
        json.dumps({"tokens": TOKENS, "d_model": D, "versions": versions, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
