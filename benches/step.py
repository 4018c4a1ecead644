"""What a training step, a switch of the task and a hundred tasks cost: ratios, measured interleaved in one process.

    python benches/step.py [--rounds 15] [--threads 1]

The model is a random Llama of 27 M weights (width 384, 12 blocks), batch 8 x 128 tokens, float32, AdamW. MoSEs has 4 experts of
rank 8 and top-2 routing; PEFT's LoRA has rank 8; both at query, value and the FFN's projections. `before cut` and `after cut` are
the two phases of a task. Prints a table and writes benches/results/step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moses

HERE = Path(__file__).parent
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=12,
            num_attention_heads=6,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )


def stepper(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (time.perf_counter() - start)

    return step


def attached(tasks: int = 0, cut: bool = False, candidates: int = 8) -> moses.MosesModel:
    model = moses.attach(base_model(), moses.MosesConfig(num_experts=4, rank=8, top_k=2, candidates=candidates))
    for index in range(tasks):
        model.begin_task(f"task {index}")
        with torch.no_grad():
            for linear in model._banks().values():
                linear.bank.free_B.normal_(std=1e-3)
        model.end_task(f"task {index}")
    model.begin_task("open")
    if cut:
        with torch.no_grad():
            for linear in model._banks().values():
                linear.bank.free_B.normal_(std=1e-3)
        model.cut_task()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    lora = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    steps = {
        "PEFT LoRA rank 8": stepper(lora, batch),
        "MoSEs, before cut": stepper(attached(), batch),
        "MoSEs, before cut, every component a candidate": stepper(attached(candidates=32), batch),
        "MoSEs, after cut": stepper(attached(cut=True), batch),
        "MoSEs, after cut, 100 tasks ended": stepper(attached(100, cut=True), batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 2):
        for name, step in steps.items():
            seconds = step()
            if round_number >= 2:
                times[name].append(seconds)
    reference = times["PEFT LoRA rank 8"]
    rows = []
    for name, values in times.items():
        ratios = [mine / other for mine, other in zip(values, reference, strict=True)]
        rows.append(
            {
                "what": name,
                "ms": statistics.median(values),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
        )
    many = [
        mine / other
        for mine, other in zip(times["MoSEs, after cut, 100 tasks ended"], times["MoSEs, after cut"], strict=True)
    ]
    model = attached(100)
    switches = []
    for index in range(200):
        start = time.perf_counter()
        with model.task(f"task {index % 100}"):
            switches.append(1000 * (time.perf_counter() - start))
    print("| what | ms | ratio to LoRA | range |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['what']} | {row['ms']:.0f} | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} |")
    print(f"100 ended tasks: {statistics.median(many):.3f} times the step of none")
    print(f"switching a task: {statistics.median(switches):.4f} ms, at most {max(switches):.4f} ms")
    result = {
        "steps": rows,
        "hundred_tasks_ratio": statistics.median(many),
        "switch_ms": statistics.median(switches),
        "switch_ms_max": max(switches),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
