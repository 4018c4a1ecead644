"""The time of a training step while a layer grows, and the memory of the old model that Lifelong-MoE learns from.

    python benches/growth.py [--json FILE]

Grows one model's layers from 4 to 64 experts, four at a time, frozen after each round as tasks do, at constant top-k. Steps of models with different
numbers of experts are taken in turn, so that what else the machine does meets all of them; the bar is 64 experts within 1.15 times of 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moses.growth.context import GrowthContext
from moses.growth.growing import GrowingLayer
from moses.growth.install import growing_places, install
from moses.methods import method_class
from moses.surgery.plan import Slot

COUNTS = (4, 16, 64)
STEP = 4  # experts a round, free in the last one
BAR = 1.15


def base(width: int, layers: int) -> Any:
    """A random Llama with `layers` blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def grown(num_experts: int, width: int, layers: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model whose growing layers have `num_experts`, the last `STEP` of them free, spread enough for all to be used; and its optimizer."""
    model = base(width, layers)
    model.requires_grad_(False)
    places = growing_places(model, mixtures=True, every=2)
    found = install(model, places, GrowthContext(), top_k=2)
    generator = torch.Generator().manual_seed(1)
    for path, layer in found.items():
        # the dense FFN's copy is one expert of the first four; gate rows are drawn apart, so that tokens use all experts
        while layer.num_experts < num_experts:
            layer.freeze()
            count = min(STEP, num_experts - layer.num_experts) if layer.num_experts > 1 else STEP - 1
            layer.grow([Slot((0,), new=True, noise=0.1)] * count, path, layer.num_experts)
            layer.free_gate.data.normal_(std=width**-0.5, generator=generator)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(free, lr=1e-4)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of the processor that a training step takes: on one thread the step's time, whatever else the machine does."""
    start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def times(width: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step by the number of experts, and the paired ratio to the first."""
    models = {count: grown(count, width, layers) for count in COUNTS}
    ids = torch.randint(0, 2048, (8, tokens // 8), generator=torch.Generator().manual_seed(2))
    used = {}
    for count, (model, optimizer) in models.items():
        layer = next(part for part in model.modules() if isinstance(part, GrowingLayer))
        with layer.context.watch() as seen:
            step(model, optimizer, ids)
        used[count] = int((seen[0][1].load > 0).sum())
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count, (model, optimizer) in models.items():
            seconds[count].append(step(model, optimizer, ids))
    first = COUNTS[0]
    return {
        "width": width,
        "layers": layers,
        "tokens": tokens,
        "rounds": rounds,
        "experts_used": used,
        "seconds": {count: statistics.median(values) for count, values in seconds.items()},
        "ratio": {
            count: statistics.median(a / b for a, b in zip(values, seconds[first], strict=True))
            for count, values in seconds.items()
        },
    }


def memory(width: int, layers: int) -> dict[str, int]:
    """Bytes that the old model of a second task takes beside the new one, with the trunk frozen and with it trained."""
    found = {}
    for trained in (False, True):
        model = base(width, layers)
        cls = method_class("lifelong-moe")
        method = cls(model, cls.config_class(train_trunk=trained, source="fresh"))
        method.begin_task("one", None, None, None)
        method.end_task("one")
        method.begin_task("two", None, None, None)
        old = method._old_trunk  # type: ignore[attr-defined]
        found["trunk trained" if trained else "trunk frozen"] = sum(t.numel() * t.element_size() for t in old.values())
        found["model"] = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = times(given.width, given.layers, given.tokens, given.rounds) | {
        "old_model_bytes": memory(given.width, given.layers)
    }
    for count in COUNTS:
        print(
            f"{count:3d} experts ({result['experts_used'][count]} used): {1e3 * result['seconds'][count]:7.1f} ms a step, "
            f"{result['ratio'][count]:.3f} times that of {COUNTS[0]}"
        )
    print(f"bar {BAR}: {'met' if result['ratio'][COUNTS[-1]] <= BAR else 'MISSED'}")
    for name, size in result["old_model_bytes"].items():
        print(f"{'old model, ' if name != 'model' else ''}{name}: {size:,} bytes")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
