"""FFN experts by dispatch against all of the task's neurons weighted by gates: ratios, measured interleaved in one process.

    python benches/mixture.py [--rounds 15] [--threads 1]

The model is a random BERT of MiniLM's size (width 384, 6 blocks, FFN 1,536), batch 16 x 64 tokens, AdamW, in float32 and in bfloat16
autocast; 4 experts, top-2, 40 candidate neurons an FFN. `mixture` is one mixture of the first block forward and backward, `step` a
whole training step. Prints a table and writes benches/results/mixture.json.
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
from moses.subexperts import ffn

HERE = Path(__file__).parent
DISPATCHED = ffn.mixture


def dense(x: Tensor, down: Tensor, up: Tensor, experts: Tensor, gates: Tensor, **settings: Any) -> Tensor:
    """All of the task's neurons in one product, weighted by the gates of their experts."""
    hidden = F.gelu(F.linear(x, down.to(x.dtype)))
    return F.linear(hidden * gates[..., experts].to(hidden.dtype), up.T.to(x.dtype)) * settings["scale"]


def stepper(cut: bool, autocast: bool, way: Callable[..., Tensor], threads: int) -> tuple[Callable[[], float], ...]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
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
        "input_ids": torch.randint(0, 8192, (16, 64), generator=generator),
        "labels": torch.randint(0, 4, (16,), generator=generator),
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    layer = model.get_submodule("bert.encoder.layer.0.output")
    x = torch.randn(16, 64, 384, generator=generator, requires_grad=True)
    gates = model._routers()["bert.encoder.layer.0"].gates(x)[0].detach().requires_grad_()
    model.train()

    def step() -> float:
        ffn.mixture = way
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (time.perf_counter() - start)

    def one() -> float:
        down, up, experts = layer.bank.weights(0)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = way(x, down, up, experts, gates, width=layer.bank.width(0), top_k=2, scale=4.0)
        y.backward(torch.ones_like(y))
        return 1000 * (time.perf_counter() - start)

    return one, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("| what | dispatched ms | dense ms | ratio | range |\n| --- | --- | --- | --- | --- |")
    for autocast in (False, True):
        for cut in (False, True):
            ways = [stepper(cut, autocast, way, arguments.threads) for way in (DISPATCHED, dense)]
            for index, what in enumerate(("mixture", "step")):
                times: tuple[list[float], list[float]] = ([], [])
                for round_number in range(arguments.rounds + 2):
                    for own, way in zip(times, ways, strict=True):
                        milliseconds = way[index]()
                        if round_number >= 2:
                            own.append(milliseconds)
                ratios = [mine / other for mine, other in zip(*times, strict=True)]
                name = f"{what}, {'bfloat16 autocast' if autocast else 'float32'}, {'after' if cut else 'before'} cut"
                row = {
                    "what": name,
                    "dispatched_ms": statistics.median(times[0]),
                    "dense_ms": statistics.median(times[1]),
                    "ratio": statistics.median(ratios),
                    "low": min(ratios),
                    "high": max(ratios),
                }
                rows.append(row)
                print(
                    f"| {name} | {row['dispatched_ms']:.2f} | {row['dense_ms']:.2f} | {row['ratio']:.2f} | "
                    f"{row['low']:.2f} to {row['high']:.2f} |",
                    flush=True,
                )
    result = {"rows": rows, "threads": arguments.threads, "rounds": arguments.rounds, "torch": torch.__version__}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "mixture.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
