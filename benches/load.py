"""Load balance on real text: tokens per expert, and the perplexity of head and tail domains, under each rule.

    python benches/load.py [--seeds 0] [--steps 200] [--only "RULE;RULE"] [--table]

A small decoder (2 blocks of attention, width 128, and a mixture of 8 experts in each) is trained from random weights on a mix of five domains of the
built-in stream `domains`, drawn by Zipf's law: english 1, code 1/2, german 1/3, russian 1/4, japanese 1/5. Experts are equal (width 128 each) or
uneven (32 to 224, as many weights in all). Perplexity is that of the domains' held-out passages; load is tokens (pairs) per expert on all of them,
every domain with its share of the mix, as the coefficient of variation over experts, the mean of the two layers. The tokenizer (byte-level BPE, 2,048
tokens) is trained here. One row is one run; rows in benches/results/load.json already are not measured again; `--table` prints
what is there and draws load.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moses
from moses import routers

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "load.json"
DOMAINS = ("english", "code", "german", "russian", "japanese")
D, E, HEADS, LAYERS, VOCABULARY, LENGTH, BATCH = 128, 8, 4, 2, 2048, 64, 8
EQUAL = [128] * E
UNEVEN = [32, 32, 64, 96, 160, 192, 224, 224]  # the same sum
RATE = 3e-3
SHARES = [1 / rank for rank in range(1, len(DOMAINS) + 1)]

Make = Callable[[int, Tensor], nn.Module]
RULES: dict[str, Make] = {
    "top-2, no loss": lambda seed, counts: routers.TopKRouter(D, E, 2, balance_weight=0.0),
    "top-2, balance loss 0.01": lambda seed, counts: routers.TopKRouter(D, E, 2),
    "top-2, balance loss 0.1": lambda seed, counts: routers.TopKRouter(D, E, 2, balance_weight=0.1),
    "top-2, balance loss 1": lambda seed, counts: routers.TopKRouter(D, E, 2, balance_weight=1.0),
    "top-2 sigmoid, loss-free bias": lambda seed, counts: routers.TopKRouter(
        D, E, 2, scoring="sigmoid", balance_weight=0.0, bias=True
    ),
    "noisy top-2 (Shazeer)": lambda seed, counts: routers.NoisyTopKRouter(D, E, 2),
    "GShard": lambda seed, counts: routers.GShardRouter(D, E),
    "Switch": lambda seed, counts: routers.SwitchRouter(D, E),
    "expert choice": lambda seed, counts: routers.ExpertChoiceRouter(D, E),
    "random, uniform": lambda seed, counts: routers.RandomRouter(VOCABULARY, 1, E, seed=seed),
    "random, balanced": lambda seed, counts: routers.RandomRouter(VOCABULARY, 1, E, seed=seed, frequencies=[counts]),
}


class Block(nn.Module):
    def __init__(self, router: nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.moe = moses.MoELayer(D, widths, router=router)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x = x + self.out(mixed)
        flat = self.norm2(x).view(B * T, D)
        more = {"token_ids": ids.flatten(), "domains": 0} if isinstance(self.moe.router, routers.RandomRouter) else {}
        y, routed = self.moe(flat, **more)
        return x + y.view(B, T, D), routed


class Decoder(nn.Module):
    def __init__(self, make: Make, seed: int, counts: Tensor, widths: list[int]) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, D), nn.Embedding(LENGTH, D)
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(make(seed + layer, counts), widths) for layer in range(LAYERS))
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        routed = []
        for block in self.blocks:
            x, output = block(x, ids)
            routed.append(output)
        return self.norm(x) @ self.tokens.weight.T, routed


def data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows (rows, LENGTH + 1) of token ids of each domain, to train and held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from moses.stream import load_stream

    tasks = {task.name: task for task in load_stream("domains", list(DOMAINS)).tasks}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((row.answer for name in DOMAINS for row in tasks[name].train), trainer)

    def rows(examples: Any) -> Tensor:
        ids = [token for row in examples for token in bpe.encode(row.answer).ids]
        count = len(ids) // (LENGTH + 1)
        return torch.tensor(ids[: count * (LENGTH + 1)]).view(count, LENGTH + 1)

    return {n: rows(tasks[n].train) for n in DOMAINS}, {n: rows(tasks[n].test)[:160] for n in DOMAINS}


def variation(loads: list[Tensor]) -> float:
    """The mean over layers of the coefficient of variation over experts."""
    return statistics.mean(float(load.std(unbiased=False) / load.mean()) for load in loads)


def run(
    rule: str, kind: str, seed: int, steps: int, train: dict[str, Tensor], held: dict[str, Tensor]
) -> dict[str, Any]:
    torch.manual_seed(seed)
    shares = torch.tensor(SHARES) / sum(SHARES)
    counts = sum(
        share * torch.bincount(train[name].flatten(), minlength=VOCABULARY).double() / train[name].numel()
        for name, share in zip(DOMAINS, shares.tolist(), strict=True)
    )
    assert isinstance(counts, Tensor)
    model = Decoder(RULES[rule], seed, counts, EQUAL if kind == "equal" else UNEVEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    draw = torch.Generator().manual_seed(1000 + seed)
    seconds = time.monotonic()
    for _ in range(steps):
        picks = torch.multinomial(shares, BATCH, replacement=True, generator=draw).tolist()
        rows = torch.stack(
            [train[DOMAINS[d]][int(torch.randint(len(train[DOMAINS[d]]), (1,), generator=draw))] for d in picks]
        )
        logits, routed = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        extra = sum(output.loss for output in routed if output.losses) / LAYERS
        (loss + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for block, output in zip(model.blocks, routed, strict=True):
            if getattr(block.moe.router, "bias", None) is not None:
                block.moe.router.update_bias(output.load, rate=3e-3)
    seconds = time.monotonic() - seconds
    perplexity, loads = {}, {}
    for part, texts in (("held", held), ("train", train)):
        total = [torch.zeros(E, dtype=torch.float64) for _ in range(LAYERS)]
        for name, share in zip(DOMAINS, shares.tolist(), strict=True):
            x = texts[name] if part == "held" else texts[name][:256]
            model.eval()
            with torch.no_grad():
                found = [model(batch[:, :-1]) for batch in x.split(BATCH)]
            if part == "held":
                nats = [
                    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
                    for (logits, _), batch in zip(found, x.split(BATCH), strict=True)
                ]
                perplexity[name] = math.exp(sum(nats) / x[:, 1:].numel())
            for layer in range(LAYERS):
                load = sum(routed[layer].load.double() for _, routed in found)
                total[layer] += share * load / load.sum()
        loads[part] = total
    return {
        "perplexity": perplexity,
        "variation": variation(loads["held"]),
        "variation_train": variation(loads["train"]),
        "load": [(load / load.mean()).tolist() for load in loads["held"]],
        "seconds": seconds,
        "steps": steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: dict[str, Any]) -> None:
    print("| rule | experts | CV held out | CV train | head (english) | tail (japanese) | mean of five | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    shown: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        for kind in ("equal", "uneven"):
            runs = [row for key, row in rows.items() if key.startswith(f"{rule} | {kind} | ")]
            if not runs:
                continue
            median = lambda read, runs=runs: statistics.median(read(row) for row in runs)  # noqa: E731
            mean = median(lambda row: math.exp(statistics.mean(map(math.log, row["perplexity"].values()))))
            print(
                f"| {rule} | {kind} | {median(lambda r: r['variation']):.3f} | {median(lambda r: r['variation_train']):.3f} "
                f"| {median(lambda r: r['perplexity']['english']):.1f} | {median(lambda r: r['perplexity']['japanese']):.1f} "
                f"| {mean:.1f} | {len(runs)} |"
            )
            shown.setdefault(rule, {})[kind] = (median(lambda r: r["variation"]), mean)
    draw(shown, HERE / "results" / "load.png")


def draw(shown: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, cost = figure.subplots(1, 2)
    for shift, kind in ((-0.2, "equal"), (0.2, "uneven")):
        places = [place for place, rule in enumerate(shown) if kind in shown[rule]]
        values = [shown[rule][kind] for rule in shown if kind in shown[rule]]
        bars.barh([place + shift for place in places], [value[0] for value in values], 0.4, label=f"{kind} experts")
        cost.plot(
            [v[0] for v in values], [v[1] for v in values], "o" if kind == "equal" else "s", label=f"{kind} experts"
        )
    bars.set_yticks(range(len(shown)), list(shown), fontsize=8)
    bars.invert_yaxis()
    bars.set(xlabel="coefficient of variation of tokens per expert, held out", title="Load")
    cost.set(xlabel="coefficient of variation", ylabel="perplexity, mean of five domains", title="Balance and fit")
    for panel in (bars, cost):
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.table:
        train, held = data()
        for seed in map(int, arguments.seeds.split(",")):
            for kind in ("equal", "uneven"):
                for rule in arguments.only.split(";") if arguments.only else RULES:
                    key = f"{rule} | {kind} | {seed}"
                    if key not in rows:
                        rows[key] = rounded(run(rule, kind, seed, arguments.steps, train, held))
                        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
                        print(key, rows[key]["variation"], rows[key]["perplexity"], rows[key]["seconds"], flush=True)
    table(rows)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
