"""Surgery on checkpoints against `cp` and the ways that people use today: the tables of RESULTS.md.

    python benches/surgery.py [--folder build/surgery] [--rounds 5] [--gigabytes 2] [--part prune|grow|sparse|start]

Checkpoints are made by writing random bf16 tensors under the names of the model types (no hub, no model in memory); every command
is a process of its own, timed from start to end with a `sync` of what it wrote; `cp` of the same output, synced, is timed in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

MOSES = [sys.executable, "-m", "moses"]
SHARD_BYTES = 256 << 20
TYPES = {
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
}
CONFIGS = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts_per_tok": 4, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": None,
    },
}  # fmt: skip


def tensors(
    kind: str, layers: int, experts: int, width: int, inner: int, fused: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order in which they are written."""
    module, (gate, down, up) = TYPES[kind]
    heads, keys = 8 * 64, 4 * 64
    if kind == "mixtral":
        heads, keys = width, width // 2
    yield "model.embed_tokens.weight", (32_000, width)
    yield "model.norm.weight", (width,)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (width,)
        yield f"{block}.post_attention_layernorm.weight", (width,)
        for name, shape in (("q", (heads, width)), ("k", (keys, width)), ("v", (keys, width)), ("o", (width, heads))):
            yield f"{block}.self_attn.{name}_proj.weight", shape
        if kind == "qwen3_moe":
            yield f"{block}.self_attn.q_norm.weight", (64,)
            yield f"{block}.self_attn.k_norm.weight", (64,)
        if fused:
            yield f"{block}.mlp.gate.weight", (experts, width)
            yield f"{block}.mlp.experts.gate_up_proj", (experts, 2 * inner, width)
            yield f"{block}.mlp.experts.down_proj", (experts, width, inner)
            continue
        yield f"{block}.{module}.gate.weight", (experts, width)
        for expert in range(experts):
            for name, shape in ((gate, (inner, width)), (down, (width, inner)), (up, (inner, width))):
                yield f"{block}.{module}.experts.{expert}.{name}.weight", shape


def write(folder: Path, kind: str, layers: int, experts: int, width: int, inner: int, fused: bool = False, sparse: bool = False,
          shard_bytes: int = SHARD_BYTES) -> Path:  # fmt: skip
    """A checkpoint; with `sparse` of holes instead of random values."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors(kind, layers, experts, width, inner, fused):
        num_bytes = 2 * int(np.prod(shape))
        if size and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    values = np.random.default_rng(0).standard_normal(1 << 23, np.float32) * np.float32(0.02)
    block = memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard:
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(8 + len(text) + end)
            else:
                for _, shape in shard:
                    left = 2 * int(np.prod(shape))
                    while left:
                        left -= file.write(block[:left])
        total += end
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    )
    counts = (
        {"num_experts": experts, "moe_intermediate_size": inner}
        if kind == "qwen3_moe"
        else {"num_local_experts": experts}
    )
    config = CONFIGS[kind] | counts | {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 32_000,
        "max_position_embeddings": 512, "dtype": "bfloat16", "rms_norm_eps": 1e-06, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    subprocess.run(["sync"], check=True)
    return folder


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak(command: list[str]) -> float:
    """The most anonymous memory of a command, in MiB, looked at every two milliseconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                most = max(most, int(line.split()[1]))
        time.sleep(0.002)
    return most / 1024


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    run(["cp", "-r", str(source), str(target)])
    run(["sync"])


def moses(target: Path, *words: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    run([*MOSES, *words, "--out", str(target)])
    run(["sync"])


def measured(name: str, rounds: int, work: Callable[[], object], rival: Callable[[], object]) -> None:
    """Interleaved; medians, and the ratio of each round."""
    times = [(seconds(work), seconds(rival)) for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in times]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {name} | {ours:.2f} | {theirs:.2f} | {spread} |", flush=True)


FROM_PRETRAINED = """
import sys, torch, transformers as hf
source, out, kind, kept = sys.argv[1], sys.argv[2], sys.argv[3], list(range(0, int(sys.argv[4]), 2))
model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
for layer in model.model.layers:
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer.mlp.experts, name, torch.nn.Parameter(getattr(layer.mlp.experts, name).data[kept].clone()))
    layer.mlp.gate.weight = torch.nn.Parameter(layer.mlp.gate.weight.data[kept].clone())
model.config.num_experts = model.config.num_local_experts = len(kept)
model.save_pretrained(out)
"""
SAFE_OPEN = """
import sys, re, json, glob, os
from safetensors import safe_open
from safetensors.torch import save_file
source, out, kept = sys.argv[1], sys.argv[2], list(range(0, int(sys.argv[4]), 2))
os.makedirs(out)
new = {old: n for n, old in enumerate(kept)}
for path in sorted(glob.glob(source + "/*.safetensors")):
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():
            match = re.search(r"experts\\.(\\d+)\\.", name)
            if match and int(match[1]) not in new: continue
            tensor = file.get_tensor(name)
            if match: name = name.replace(f"experts.{match[1]}.", f"experts.{new[int(match[1])]}.")
            elif ".gate.weight" in name: tensor = tensor[kept].contiguous()
            found[name] = tensor
    if found: save_file(found, out + "/" + os.path.basename(path), {"format": "pt"})
"""


def bench_prune(folder: Path, rounds: int, gigabytes: float) -> None:
    sizes = {"qwen3_moe": (32, 1024, 704), "mixtral": (8, 2048, 3072)}
    print("| what | seconds | `cp` of the output, seconds | ratio (range) |\n| --- | --- | --- | --- |")
    peaks = {}
    for kind, (experts, width, inner) in sizes.items():
        layers = max(2, round(gigabytes * 1e9 / (experts * width * inner * 6)))
        source = write(folder / kind, kind, layers, experts, width, inner)
        peaks[kind] = bench_type(folder, rounds, kind, source, experts)
        shutil.rmtree(source)
    for kind, most in peaks.items():
        print(f"\n{kind}: peak anonymous memory of prune {most:.1f} MiB")


def bench_type(folder: Path, rounds: int, kind: str, source: Path, experts: int) -> float:
    """Every operation on one checkpoint; returns the peak memory of prune in MiB."""
    out, twin = folder / "out", folder / "twin"
    keep = ",".join(map(str, range(0, experts, 2)))

    def against(name: str, work: Callable[[], object], times: int = rounds) -> None:
        """Measure `work`, which writes `out`, against a copy of what it writes."""
        work()
        reference = out.rename(folder / "reference")
        measured(f"{kind}: {name}", times, work, lambda: copy(reference, twin))
        shutil.rmtree(reference)
        shutil.rmtree(out)
        shutil.rmtree(twin)

    def by_moses(name: str, *words: str) -> None:
        against(name, lambda: moses(out, *words))

    def by_script(name: str, code: str, times: int) -> None:
        def work() -> None:
            shutil.rmtree(out, ignore_errors=True)
            run([sys.executable, "-c", code, str(source), str(out), kind, str(experts)])
            run(["sync"])

        against(name, work, times)

    by_moses("prune half", "prune", str(source), "--keep", keep)
    by_moses("prune half, --hash", "prune", str(source), "--keep", keep, "--hash")
    by_script("prune half by safe_open, shard by shard", SAFE_OPEN, rounds)
    by_script("prune half by from_pretrained and save_pretrained", FROM_PRETRAINED, 1)
    by_moses("extract half", "extract", str(source), "--experts", keep)
    by_moses("convert to fused", "convert", str(source), "--layout", "fused")
    fused, half = folder / "fused", folder / "half"
    moses(fused, "convert", str(source), "--layout", "fused")
    by_moses("convert to per-expert", "convert", str(fused), "--layout", "per-expert")
    by_moses("prune half, fused", "prune", str(fused), "--keep", keep)
    shutil.rmtree(fused)
    moses(half, "prune", str(source), "--keep", keep)
    by_moses("merge two halves", "merge", str(half), str(half))
    shutil.rmtree(half)
    most = peak([*MOSES, "prune", str(source), "--keep", keep, "--out", str(out)])
    shutil.rmtree(out)
    return most


def bench_grow(folder: Path, rounds: int) -> None:
    """One expert for each of the layers, so that the new bytes are the same in both."""
    print(
        "| checkpoint | new bytes | seconds | `cp` of the new bytes, seconds | 3 x cp + 0.3 |\n| --- | --- | --- | --- | --- |"
    )
    for gigabytes in (1, 8):
        source = write(folder / "grow", "qwen3_moe", 20, 8 * gigabytes, 1024, 1024, shard_bytes=1 << 30)
        grow(f"{gigabytes} GB", source, folder / "new", rounds)
        shutil.rmtree(source)


def grow(name: str, source: Path, new: Path, rounds: int) -> None:
    times, copies, written = [], [], 0
    for _ in range(rounds):
        before = {path.name for path in source.glob("*.safetensors")}
        times.append(seconds(lambda: (run([*MOSES, "grow", str(source), "--add", "1", "--in-place"]), run(["sync"]))))
        made = [path for path in source.glob("*.safetensors") if path.name not in before]
        written = sum(path.stat().st_size for path in made)
        new.mkdir()
        words = ["cp", *map(str, made), str(new)]
        copies.append(seconds(lambda words=words: (run(words), run(["sync"]))))  # type: ignore[misc]
        shutil.rmtree(new)
    ours, theirs = statistics.median(times), statistics.median(copies)
    print(f"| {name} | {written / 1e6:.0f} MB | {ours:.2f} | {theirs:.2f} | {3 * theirs + 0.3:.2f} |", flush=True)


def bench_sparse(folder: Path, rounds: int) -> None:
    source = write(folder / "sparse", "qwen3_moe", 104, 128, 1024, 744, sparse=True, shard_bytes=300 << 20)
    count = len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"\n{size / 1e9:.0f} GB of holes, {count} tensors, {len(list(source.glob('*.safetensors')))} shards")
    for words in (["inspect", str(source)], ["prune", str(source), "--keep", "0-63", "--dry-run"]):
        times = [seconds(partial(run, [*MOSES, *words])) for _ in range(rounds)]
        print(
            f"moses {words[0]}: {statistics.median(times):.2f} s, peak anonymous memory {peak([*MOSES, *words]):.0f} MiB",
            flush=True,
        )
    shutil.rmtree(source)


def bench_start(folder: Path, rounds: int) -> None:
    source = write(folder / "small", "qwen3_moe", 2, 4, 64, 32)
    times = [seconds(lambda: run([*MOSES, "inspect", str(source)])) for _ in range(4 * rounds)]
    print(
        f"\nmoses inspect of a small checkpoint: {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"
    )
    shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/surgery"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--part", choices=("start", "prune", "grow", "sparse"))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "2"
    given.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], None]] = {
        "start": lambda: bench_start(given.folder, given.rounds),
        "prune": lambda: bench_prune(given.folder, given.rounds, given.gigabytes),
        "grow": lambda: bench_grow(given.folder, given.rounds),
        "sparse": lambda: bench_sparse(given.folder, given.rounds),
    }
    for name, part in parts.items():
        if given.part in (None, name):
            part()
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
