"""FFN experts by dispatch against all of the task's neurons weighted by gates: ratios, measured interleaved in one process.

    python benches/mixture.py [--rounds 15] [--threads 1]

`mixture` is one mixture alone, forward and backward: 1,024 tokens of width 384, top-2, by the number of experts and of neurons in all
(4 x 10 is what a task starts with beside MiniLM's FFN, 4 x 4 about what its cut leaves). `step` is a training step of a random BERT of
MiniLM's size (6 blocks, FFN 1,536) with `ffn_experts="adapter"`, batch 16 x 64 tokens, AdamW, before and after the cut. Both in float32
and in bfloat16 (the step in autocast). Prints a table and writes benches/results/mixture.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import moses
from moses.routers.task import topk_gates
from moses.subexperts import ffn

HERE = Path(__file__).parent
TOKENS, WIDTH, TOP_K = (16, 64), 384, 2
SIZES = ((4, 4), (4, 10), (4, 40), (8, 40), (16, 40), (32, 40))
DISPATCHED = ffn.mixture
Way = Callable[..., Tensor]
Timed = Callable[[], float]


def dense(x: Tensor, down: Tensor, up: Tensor, experts: Tensor, gates: Tensor, **settings: Any) -> Tensor:
    """All of the task's neurons in one product, weighted by the gates of their experts."""
    hidden = F.gelu(F.linear(x, down.to(x.dtype)))
    return F.linear(hidden * gates[..., experts].to(hidden.dtype), up.T.to(x.dtype)) * settings["scale"]


def alone(num_experts: int, neurons: int, dtype: torch.dtype, way: Way) -> Timed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    down, up = (torch.randn(num_experts * neurons, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    experts = torch.arange(num_experts).repeat_interleave(neurons)
    gates = topk_gates(torch.randn(*TOKENS, num_experts, generator=generator), TOP_K).requires_grad_()

    def run() -> float:
        start = time.perf_counter()
        y = way(x, down, up, experts, gates, width=neurons, top_k=TOP_K, scale=4.0)
        y.backward(torch.ones_like(y))
        return 1000 * (time.perf_counter() - start)

    return run


def step(cut: bool, dtype: torch.dtype, way: Way) -> Timed:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192, hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = moses.attach(BertForSequenceClassification(config), moses.MosesConfig(ffn_experts="adapter"))
    model.begin_task("a", num_labels=4)
    if cut:
        with torch.no_grad():
            for layer in model._banks().values():
                layer.bank.free_B.normal_(std=1e-3)
        model.cut_task()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 8192, TOKENS, generator=generator),
        "labels": torch.randint(0, 4, TOKENS[:1], generator=generator),
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def run() -> float:
        ffn.mixture = way
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (time.perf_counter() - start)

    return run


def compare(what: str, rounds: int, make: Callable[[Way], Timed]) -> dict[str, Any]:
    runs = [make(way) for way in (DISPATCHED, dense)]
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 2):
        for own, run in zip(times, runs, strict=True):
            milliseconds = run()
            if round_number >= 2:
                own.append(milliseconds)
    ratios = [mine / other for mine, other in zip(*times, strict=True)]
    row = {
        "what": what,
        "dispatched_ms": statistics.median(times[0]),
        "dense_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }
    print(
        f"| {what} | {row['dispatched_ms']:.1f} | {row['dense_ms']:.1f} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} |",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("| what | dispatched, ms | dense, ms | ratio | range |\n| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for num_experts, neurons in SIZES:
            what = f"mixture, {num_experts} experts of {neurons}, {name}"
            rows.append(
                compare(what, arguments.rounds, lambda way, s=(num_experts, neurons), d=dtype: alone(*s, d, way))
            )
        for cut in (False, True):
            what = f"step, {'after' if cut else 'before'} the cut, {name}"
            rows.append(compare(what, arguments.rounds, lambda way, c=cut, d=dtype: step(c, d, way)))
    result = {"rows": rows, "threads": arguments.threads, "rounds": arguments.rounds, "torch": torch.__version__}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "mixture.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
