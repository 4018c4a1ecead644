"""How evenly each router loads its experts on skewed input: the coefficient of variation of tokens per expert, while a layer learns.

    python benches/balance.py [--steps 400] [--seeds 3] [--threads 1]

A `MoELayer` of 16 experts (D 32, F 32) learns, by Adam at 3e-3 and batches of 1,024 tokens, a map that differs from token id to token id.
The 2,048 ids follow Zipf's law, an id's tokens lie about a point of its own, and all share an offset as long as these points,
so that a fresh gate prefers few experts. Losses have their default weights; `update_bias` moves by 0.003 a step. Load is that of 8,192 other
tokens, in evaluation mode. Prints a table, writes benches/results/balance.json and balance.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import moses
from moses import routers
from moses.context import Group, TaskContext
from moses.plan import dispatch_plan
from moses.routes import RouterOutput, expert_capacity

HERE = Path(__file__).parent
D, F, E, IDS, BATCH, HELD_OUT = 32, 32, 16, 2048, 1024, 8192
RATE, CAPACITY = 3e-3, 1.25


def task_router() -> nn.Module:
    context = TaskContext(groups=(Group(0),), open_task=0)
    router = routers.TaskRouter("bench", D, E, 2, None, seed=0, context=context)
    router.open(0)
    return router


def zipf() -> Tensor:
    weights = 1.0 / torch.arange(1, IDS + 1).double()
    return weights / weights.sum()


RULES: dict[str, Callable[[int], nn.Module]] = {
    "dense": lambda seed: routers.DenseRouter(D, E),
    "top-2, no loss": lambda seed: routers.TopKRouter(D, E, 2, balance_weight=0.0),
    "top-2, balance loss": lambda seed: routers.TopKRouter(D, E, 2),
    "top-2, balance and z loss": lambda seed: routers.TopKRouter(D, E, 2, z_weight=1e-3),
    "top-2 sigmoid, loss-free bias": lambda seed: routers.TopKRouter(
        D, E, 2, scoring="sigmoid", balance_weight=0.0, bias=True
    ),
    "top-2 of 2 of 4 groups, balance loss": lambda seed: routers.TopKRouter(D, E, 2, num_groups=4, top_groups=2),
    "noisy top-2 (Shazeer)": lambda seed: routers.NoisyTopKRouter(D, E, 2),
    "GShard": lambda seed: routers.GShardRouter(D, E),
    "Switch": lambda seed: routers.SwitchRouter(D, E),
    "expert choice": lambda seed: routers.ExpertChoiceRouter(D, E),
    "task (MoSEs), no loss": lambda seed: task_router(),
    "random, uniform": lambda seed: routers.RandomRouter(IDS, 1, E, seed=seed),
    "random, balanced": lambda seed: routers.RandomRouter(IDS, 1, E, seed=seed, frequencies=[zipf()]),
}


class Tokens:
    """Skewed tokens and what they are to become."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(IDS, D, generator=self.generator)
        self.offset = torch.randn(D, generator=self.generator)
        self.maps = torch.randn(IDS, D, 2, generator=self.generator) * D**-0.5
        self.out = torch.randn(2, D, generator=self.generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count, D) tokens, their ids, and their targets."""
        ids = torch.multinomial(zipf(), count, replacement=True, generator=self.generator)
        x = self.points[ids] + self.offset + 0.5 * torch.randn(count, D, generator=self.generator)
        y = torch.einsum("td,tdr,re->te", x, self.maps[ids], self.out)
        return x, ids, y


def dropped(output: RouterOutput) -> float:
    """Share of the pairs over the capacity that GShard's formula gives."""
    ids = output.routes.expert_ids
    if output.plan is not None:
        return 0.0
    capacity = expert_capacity(ids.shape[0], ids.shape[1], E, CAPACITY)
    return dispatch_plan(ids, E, capacity).num_dropped / ids.numel()


def train(rule: str, seed: int, steps: int) -> dict[str, object]:
    torch.manual_seed(seed)
    router = RULES[rule](seed)
    layer = moses.MoELayer(D, F, E, router=router, experts="up_down", activation="gelu")
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE)
    data = Tokens(seed)
    held_x, held_ids, held_y = data.draw(HELD_OUT)
    fixed = isinstance(router, routers.RandomRouter)

    def call(x: Tensor, ids: Tensor) -> tuple[Tensor, RouterOutput]:
        return layer(x, token_ids=ids, domains=0) if fixed else layer(x)

    curve = []
    for step in range(steps + 1):
        if step % 20 == 0:
            layer.eval()
            with torch.no_grad():
                y, output = call(held_x, held_ids)
            curve.append(float(output.load_variation))
            layer.train()
        if step == steps:
            break
        x, ids, wanted = data.draw(BATCH)
        found, routed = call(x, ids)
        (torch.nn.functional.mse_loss(found, wanted) + routed.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if getattr(router, "bias", None) is not None:
            router.update_bias(routed.load, rate=3e-3)
    load = output.load.double()
    return {
        "curve": curve,
        "load": sorted((load / load.mean()).tolist(), reverse=True),
        "dropped": dropped(output),
        "error": float((y - held_y).square().mean() / held_y.var()),
    }


def draw(results: dict[str, list[dict[str, object]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, at_end = figure.subplots(1, 2)
    styles = ["-", "--", ":"]
    for place, (rule, runs) in enumerate(results.items()):
        look = {"color": f"C{place % 10}", "linestyle": styles[place // 10], "linewidth": 1.5}
        curve = [statistics.median(values) for values in zip(*(run["curve"] for run in runs), strict=True)]
        over_time.plot([20 * step for step in range(len(curve))], curve, label=rule, **look)
        load = [statistics.median(values) for values in zip(*(run["load"] for run in runs), strict=True)]
        at_end.plot(range(1, E + 1), load, **look)
    over_time.set(xlabel="step", ylabel="coefficient of variation of load", title="Load balance while a layer learns")
    at_end.set(xlabel="expert, most loaded first", ylabel="load / mean load", title="Load at the end", ylim=(0, 4))
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, list[dict[str, object]]] = {}
    for rule in RULES:
        results[rule] = [train(rule, seed, arguments.steps) for seed in range(arguments.seeds)]
    print(f"| router | CV at the start | CV at the end | range | dropped at {CAPACITY} | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rule, runs in results.items():
        first = statistics.median(run["curve"][0] for run in runs)
        last = sorted(run["curve"][-1] for run in runs)
        lost, error = (statistics.median(run[key] for run in runs) for key in ("dropped", "error"))
        print(
            f"| {rule} | {first:.2f} | {statistics.median(last):.2f} | {last[0]:.2f} to {last[-1]:.2f} "
            f"| {100 * lost:.1f}% | {error:.3f} |"
        )
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    settings = {"steps": arguments.steps, "seeds": arguments.seeds, "torch": torch.__version__}
    (folder / "balance.json").write_text(json.dumps({"settings": settings, "rules": rounded(results)}, indent=1) + "\n")
    draw(results, folder / "balance.png")


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
