"""`moses.grow` and `moses.prune`: surgery on a model in memory, in the middle of a training run if need be.

Each makes a `SurgeryPlan` and applies it; nothing is edited in passing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SurgeryError
from ..surgery.plan import LayerSurgery, Slot, SurgeryPlan, keep
from .apply import apply
from .mixtures import Mixture, mixtures
from .usage import Use, measure_use

Batches = Iterable[Mapping[str, Tensor]]
By = Literal["use", "norm", "merge"]


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did, or would do.

    Attributes:
        plan: the surgery.
        bytes_before, bytes_after: of the model's parameters and buffers.
        perplexity_before, perplexity_after: on held-out text, by domain.
        applied: whether the model was changed.
    """

    plan: SurgeryPlan
    bytes_before: int
    bytes_after: int
    perplexity_before: dict[str, float]
    perplexity_after: dict[str, float]
    applied: bool


def grow(
    model: nn.Module,
    layers: Literal["all"] | Sequence[str | int] = "all",
    add: int = 4,
    source: Literal["most-used", "fresh"] | int = "most-used",
    *,
    noise: float = 0.01,
    new_rows: Literal["copy", "masked"] = "copy",
    calibration: Batches | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> SurgeryPlan:
    """Add experts to the mixtures of `model`, in place.

    Args:
        model: a model with mixtures: a MoE class of transformers, `MoELayer`, `GrowingLayer`.
        layers: paths of blocks (`model.layers.3`) or their numbers.
        add: experts a layer.
        source: what they are copied from: the `most-used` ones on `calibration`, the expert of this number, or nothing (`fresh`).
        noise: on a copy and its gate row, relative to the deviation of each tensor.
        new_rows: as in `SurgeryPlan`.
        calibration: batches, as keyword arguments of the model's forward.
        optimizer: of the model; its state follows.
        seed: of noise and fresh experts.

    Returns:
        The plan that was applied.

    Raises:
        SurgeryError: before anything has changed.
    """
    found = _chosen(model, layers)
    if isinstance(add, bool) or not isinstance(add, int) or add < 1:
        raise SurgeryError(f"add is {add!r}; it must be a number of experts from 1", code="bad_plan")
    if source == "most-used" and calibration is None:
        raise SurgeryError(
            "the most used experts are found on data; give calibration=, or source=EXPERT or 'fresh'",
            code="calibration_needed",
        )
    if source not in ("most-used", "fresh") and (isinstance(source, bool) or not isinstance(source, int)):
        raise SurgeryError(
            f"source is {source!r}; it must be most-used, fresh or the number of an expert", code="bad_plan"
        )
    use = measure_use(model, calibration) if source == "most-used" and calibration is not None else {}
    parts = []
    for part in found:
        if source == "fresh":
            added = [Slot(new=True)] * add
        else:
            best = _order(use[part.block].tokens.double()) if source == "most-used" else [int(source)]
            added = [Slot((best[i % len(best)],), new=True, noise=noise) for i in range(add)]
        kept = [Slot((expert,)) for expert in range(part.num_experts)]
        parts.append(LayerSurgery(part.block, part.num_experts, (*kept, *added)))
    plan = SurgeryPlan(tuple(parts), new_rows=new_rows, seed=seed)
    apply(model, plan, optimizer)
    return plan


def prune(
    model: nn.Module,
    *,
    keep_usage: float | None = None,
    to: int | None = None,
    budget: int | None = None,
    experts: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    by: By = "use",
    layers: Literal["all"] | Sequence[str | int] = "all",
    top_k: int | None = None,
    calibration: Batches | None = None,
    held_out: Mapping[str, Batches] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Take experts out of the mixtures of `model`, in place; their gate rows go with them. Give one of the first four.

    Args:
        keep_usage: the share of each layer's routed tokens that the experts that stay have now; where the class has one number of experts for all
            layers, each keeps as many as the layer that needs most.
        to: experts that stay in each layer.
        budget: bytes of the model's parameters and buffers after it.
        experts: those that go, in every layer or by the path of the block.
        by: which go first: the least used (`use`), those of the least router-weighted activation norm (`norm`; REAP, arXiv 2510.13999), or none: the
            two most alike are averaged, by use, until the number is reached (`merge`).
        layers: as in `grow`.
        top_k: experts a token from now on; None leaves it.
        calibration: batches; needed but for `experts`, and for `merge`, which then averages evenly.
        held_out: batches with labels by domain, for the report's perplexities.
        optimizer: of the model; its state follows.
        dry_run: report what it would cost, and leave the model and the optimizer as they are.

    Raises:
        SurgeryError: before anything has changed: a layer without experts, top-k above the experts left, an unknown expert, a budget below what the
            model needs without experts.
    """
    given = [
        name
        for name, value in (("keep_usage", keep_usage), ("to", to), ("budget", budget), ("experts", experts))
        if value is not None
    ]
    if len(given) != 1 or by not in ("use", "norm", "merge"):
        raise SurgeryError(
            f"prune was given {', '.join(given) or 'nothing'} and by={by!r}; give one of keep_usage, to, budget, experts, and by use, norm or merge",
            code="bad_plan",
        )
    found = _chosen(model, layers)
    if experts is not None:
        plan = keep({part.block: part.num_experts for part in found}, _left(found, experts), top_k)
    else:
        if calibration is None and by != "merge":
            raise SurgeryError(
                "what is used is found on data; give calibration=, or experts=", code="calibration_needed"
            )
        use = {} if calibration is None else measure_use(model, calibration, norms=by == "norm")
        counts = _counts(model, found, use, keep_usage, to, budget)
        plan = SurgeryPlan(
            tuple(_cut(model, part, use.get(part.block), counts[part.block], by) for part in found), top_k
        )
    texts = {name: [dict(batch) for batch in batches] for name, batches in (held_out or {}).items()}
    size = model_bytes(model)
    before = {name: perplexity(model, batches) for name, batches in texts.items()}
    undo = apply(model, plan, optimizer)
    report = PruneReport(
        plan,
        size,
        model_bytes(model),
        before,
        {name: perplexity(model, batches) for name, batches in texts.items()},
        not dry_run,
    )
    if dry_run:
        undo()
    return report


@torch.no_grad()
def perplexity(model: nn.Module, batches: Batches) -> float:
    """exp of the mean negative log-likelihood of a label, in float64, over batches with `input_ids` and `labels` (-100: none). nan for no labels."""
    total, count, training = 0.0, 0, model.training
    model.eval()
    try:
        for batch in batches:
            labels = batch["labels"][:, 1:]
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
            mask = labels >= 0
            total += float(F.cross_entropy(logits[mask].double(), labels[mask], reduction="sum"))
            count += int(mask.sum())
    finally:
        model.train(training)
    return math.exp(total / count) if count else math.nan


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers; tied ones count once."""
    tensors = {id(part): part for part in (*model.parameters(), *model.buffers())}
    return sum(part.numel() * part.element_size() for part in tensors.values())


def _chosen(model: nn.Module, layers: Literal["all"] | Sequence[str | int]) -> list[Mixture]:
    found = mixtures(model)
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no mixture of experts; upcycle it first", code="no_mixture")
    if layers == "all":
        return found
    names = {part.block: part for part in found} | {part.block.rpartition(".")[2]: part for part in found}
    unknown = [layer for layer in layers if str(layer) not in names]
    if unknown:
        known = ", ".join(part.block for part in found)
        raise SurgeryError(f"the model has no experts at {unknown[0]}; it has them at {known}", code="unknown_layer")
    wanted = {names[str(layer)].block for layer in layers}
    return [part for part in found if part.block in wanted]


def _left(found: list[Mixture], experts: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    gone = experts if isinstance(experts, Mapping) else {part.block: experts for part in found}
    names = {part.block: part for part in found}
    left = {}
    for block, ids in gone.items():
        if block not in names:
            raise SurgeryError(
                f"the model has no experts at {block}; it has them at {', '.join(names)}", code="unknown_layer"
            )
        count = names[block].num_experts
        unknown = [expert for expert in ids if expert not in range(count)]
        if unknown:
            raise SurgeryError(f"{block}: has experts 0 to {count - 1}, not {unknown[0]}", code="unknown_expert")
        left[block] = [expert for expert in range(count) if expert not in set(ids)]
    return left


def _counts(
    model: nn.Module,
    found: list[Mixture],
    use: dict[str, Use],
    keep_usage: float | None,
    to: int | None,
    budget: int | None,
) -> dict[str, int]:
    """Experts that stay in each layer."""
    if to is not None:
        if to < 1:
            raise SurgeryError(
                f"{found[0].block}: no expert would be left of {to}; keep at least one", code="no_expert_left"
            )
        return {part.block: min(to, part.num_experts) for part in found}
    if budget is not None:
        return _within(model, found, budget)
    assert keep_usage is not None
    if not 0.0 < keep_usage <= 1.0:
        raise SurgeryError(f"keep_usage is {keep_usage!r}; it must be a share above 0 and at most 1", code="bad_plan")
    if not use:
        raise SurgeryError("keep_usage needs calibration=", code="calibration_needed")
    counts = {}
    for part in found:
        tokens = use[part.block].tokens.double()
        share = tokens.sort(descending=True).values.cumsum(0) / tokens.sum().clamp(min=1)
        needed = int((share < keep_usage - 1e-12).sum()) + 1
        counts[part.block] = min(part.num_experts, max(needed, min(part.top_k, part.num_experts)))
    most = max((counts[part.block] for part in found if part.uniform), default=0)
    return {part.block: most if part.uniform else counts[part.block] for part in found}


def _within(model: nn.Module, found: list[Mixture], budget: int) -> dict[str, int]:
    """As many experts as `budget` bytes hold, the same number in every layer where it has them."""
    sizes = {part.block: part.bytes_per_expert(model) for part in found}
    others = model_bytes(model) - sum(sizes[part.block] * part.num_experts for part in found)
    for count in range(max(part.num_experts for part in found), 0, -1):
        counts = {part.block: min(count, part.num_experts) for part in found}
        if others + sum(sizes[block] * number for block, number in counts.items()) <= budget:
            return counts
    least = others + sum(sizes.values())
    raise SurgeryError(
        f"budget is {budget:,} bytes and the model with one expert a layer has {least:,}; give more",
        code="budget_too_small",
    )


def _cut(model: nn.Module, part: Mixture, use: Use | None, count: int, by: By) -> LayerSurgery:
    if by == "merge":
        tokens = torch.ones(part.num_experts) if use is None else use.tokens
        return LayerSurgery(part.block, part.num_experts, _merged(model, part, tokens.tolist(), count))
    assert use is not None
    order = _order(use.norm if by == "norm" else use.tokens.double())
    return LayerSurgery(part.block, part.num_experts, tuple(Slot((expert,)) for expert in sorted(order[:count])))


def _merged(model: nn.Module, part: Mixture, tokens: list[int], count: int) -> tuple[Slot, ...]:
    """Average the two clusters of experts whose mean weights are most alike (by their cosine), until `count` are left; ties to the lower ones."""
    flat = torch.cat([tensor.flatten(1).float().cpu() for tensor in part.tensors(model).values()], dim=1)
    clusters = [[expert] for expert in range(part.num_experts)]
    while len(clusters) > count:
        centres = F.normalize(torch.stack([_mean(flat, cluster, tokens) for cluster in clusters]), dim=1)
        alike = torch.triu(centres @ centres.T + 2.0, diagonal=1)  # cosines from 1 to 3, and 0 below the diagonal
        first, second = divmod(int(alike.argmax()), len(clusters))
        clusters[first] += clusters.pop(second)
    slots = []
    for cluster in sorted(sorted(members) for members in clusters):
        weights = _weights(cluster, tokens)
        slots.append(Slot((cluster[0],)) if len(cluster) == 1 else Slot(tuple(cluster), weights))
    # the experts of a growing layer that are kept stand before those that are made
    return tuple(sorted(slots, key=lambda slot: not slot.kept)) if part.form is None else tuple(slots)


def _weights(cluster: list[int], tokens: list[int]) -> tuple[float, ...]:
    total = sum(tokens[expert] for expert in cluster)
    return tuple(tokens[expert] / total if total else 1 / len(cluster) for expert in cluster)


def _mean(flat: Tensor, cluster: list[int], tokens: list[int]) -> Tensor:
    return torch.tensor(_weights(cluster, tokens)) @ flat[cluster]


def _order(scores: Tensor) -> list[int]:
    """Experts from the highest score on; ties to the lower id."""
    order: list[int] = torch.sort(scores, descending=True, stable=True).indices.tolist()
    return order
