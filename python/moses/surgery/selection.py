"""Which experts a plan keeps, copies or joins: from lists, usage and norms to a `SurgeryPlan`. Pure, and free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import SurgeryError
from . import plan
from .plan import LayerSurgery, NewRows, Slot, SurgeryPlan

MAX_JSON_BYTES = 64 << 20
"""Usage of 100 layers of 1,000 experts takes some 2 MB."""

Choice = Sequence[int] | Mapping[str, Sequence[int]]
"""Experts of every layer alike, or by layer."""

NewRowsChoice = Literal["auto", "copy", "masked"]


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a checkpoint.

    Attributes:
        path: for messages.
        num_experts: of each layer, by the path of its block, in the order of the blocks.
        top_k: experts that a token uses; None where the config does not say.
        groups: groups that a token's experts are chosen from; 1 where routing is not by groups.
        can_mask: whether every gate has a selection bias.
    """

    path: str
    num_experts: Mapping[str, int]
    top_k: int | None
    groups: int
    can_mask: bool


def by_layer(facts: Facts, choice: Choice, what: str) -> dict[str, list[int]]:
    """The choice for each layer; layers that a mapping does not name are left out. Raises `SurgeryError`."""
    if isinstance(choice, Mapping):
        unknown = [layer for layer in choice if layer not in facts.num_experts]
        if unknown:
            known = next(iter(facts.num_experts), "none")
            raise SurgeryError(
                f"{what}: {unknown[0]!r} is no layer with experts of {facts.path}; they are named like {known!r}",
                code="unknown_layer",
            )
        named = {layer: choice[layer] for layer in facts.num_experts if layer in choice}
    else:
        named = dict.fromkeys(facts.num_experts, choice)
    for layer, experts in named.items():
        count = facts.num_experts[layer]
        if not isinstance(experts, (list, tuple, range)):
            raise SurgeryError(f"{what}: {layer} has {experts!r}; give a list of expert numbers", code="bad_choice")
        wrong = [e for e in experts if isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < count]
        if wrong:
            raise SurgeryError(f"{what}: {layer} has experts 0 to {count - 1}, not {wrong[0]!r}", code="unknown_expert")
        if len(set(experts)) != len(experts):
            raise SurgeryError(f"{what}: {layer} names an expert twice", code="bad_choice")
    return {layer: list(experts) for layer, experts in named.items()}


def keep(facts: Facts, choice: Choice, top_k: int | None = None) -> SurgeryPlan:
    """The plan that keeps the chosen experts, in the order in which they are named."""
    return plan.keep(facts.num_experts, by_layer(facts, choice, "keep"), top_k)


def most_used(facts: Facts, usage: Mapping[str, Sequence[float]], to: int) -> dict[str, list[int]]:
    """The `to` experts of each layer that are used most, ascending; of ties the lower number.

    Where routing is by groups, as many of each group. Raises `SurgeryError` where `usage` does not fit or `to` cannot be.
    """
    if isinstance(to, bool) or not isinstance(to, int) or to < 1:
        raise SurgeryError(f"to is {to!r}; it must be a number from 1", code="bad_choice")
    if facts.groups > 1 and to % facts.groups:
        raise SurgeryError(
            f"{facts.path}: {to} experts are no multiple of its {facts.groups} groups; keep as many of each",
            code="groups_misfit",
        )
    kept = {}
    for layer, count in facts.num_experts.items():
        scores = usage.get(layer)
        if not isinstance(scores, (list, tuple)) or len(scores) != count:
            raise SurgeryError(f"usage: {layer} has {count} experts; give a number for each", code="bad_usage")
        bad = [s for s in scores if isinstance(s, bool) or not isinstance(s, (int, float)) or not math.isfinite(s)]
        if bad:
            raise SurgeryError(f"usage: {layer} has {bad[0]!r}; give finite numbers", code="bad_usage")
        if to > count:
            raise SurgeryError(f"{layer}: has {count} experts, fewer than {to}", code="bad_choice")
        size = count // facts.groups
        chosen: list[int] = []
        for first in range(0, count, size):
            ranked = sorted(range(first, first + size), key=lambda expert: (-scores[expert], expert))
            chosen += ranked[: to // facts.groups]
        kept[layer] = sorted(chosen)
    return kept


def grown(
    facts: Facts,
    add: int,
    sources: Choice | None = None,
    *,
    noise: float = 0.0,
    seed: int = 0,
    new_rows: NewRowsChoice = "auto",
    top_k: int | None = None,
) -> SurgeryPlan:
    """The plan that adds `add` experts to every layer, copies of `sources` in turn (of all experts where not given).

    Where routing is by groups each group gets as many, at its end, copied from the sources in it. `auto` masks the new rows
    where every gate has a selection bias, which keeps the model's outputs bit for bit. Raises `SurgeryError`.
    """
    if isinstance(add, bool) or not isinstance(add, int) or add < 1:
        raise SurgeryError(f"add is {add!r}; it must be a number from 1", code="bad_choice")
    groups = facts.groups
    if add % groups:
        raise SurgeryError(
            f"{facts.path}: {add} experts are no multiple of its {groups} groups; add as many to each",
            code="groups_misfit",
        )
    layers = []
    named = by_layer(facts, sources, "from") if sources is not None else {}
    for layer, count in facts.num_experts.items():
        chosen = named.get(layer, list(range(count)))
        size = count // groups
        slots: list[Slot] = []
        for first in range(0, count, size):
            members = [expert for expert in chosen if first <= expert < first + size]
            if not members:
                raise SurgeryError(
                    f"from: none of {chosen} is in the group of experts {first} to {first + size - 1}; name one of each",
                    code="groups_misfit",
                )
            slots += [Slot((expert,)) for expert in range(first, first + size)]
            slots += [Slot((members[n % len(members)],), new=True, noise=noise) for n in range(add // groups)]
        layers.append(LayerSurgery(layer, count, tuple(slots)))
    rows: NewRows = ("masked" if facts.can_mask else "copy") if new_rows == "auto" else new_rows
    return SurgeryPlan(tuple(layers), top_k, rows, seed)


def extracted(facts: Facts, choice: Choice, *, dense: bool, top_k: int | None = None) -> SurgeryPlan:
    """The plan that takes the chosen experts out; with `dense` the one that is left of each layer becomes a plain FFN."""
    chosen = by_layer(facts, choice, "experts")
    missing = [layer for layer in facts.num_experts if layer not in chosen]
    if missing:
        raise SurgeryError(f"experts: {missing[0]} is not named; name experts of every layer", code="bad_choice")
    layers = (
        LayerSurgery(layer, facts.num_experts[layer], tuple(Slot((expert,)) for expert in experts), dense)
        for layer, experts in chosen.items()
    )
    if top_k is None and facts.top_k is not None and all(len(experts) == 1 for experts in chosen.values()):
        top_k = 1
    return SurgeryPlan(tuple(layers), None if dense else top_k)


def merged(parts: Sequence[Facts], top_k: int | None = None) -> SurgeryPlan:
    """The plan that puts the experts of the later checkpoints beside the first's, group by group where routing is by groups.

    Experts of the second count on from the first's. Raises `SurgeryError` where they do not have the same layers.
    """
    first = parts[0]
    for other in parts[1:]:
        if list(other.num_experts) != list(first.num_experts) or other.groups != first.groups:
            raise SurgeryError(
                f"{other.path}: its layers with experts, or its groups, are not those of {first.path}; merge checkpoints of one model",
                code="plans_differ",
            )
    layers = []
    for layer in first.num_experts:
        counts = [part.num_experts[layer] for part in parts]
        slots = []
        for group in range(first.groups):
            begin = 0
            for count in counts:
                size = count // first.groups
                slots += [Slot((begin + group * size + member,)) for member in range(size)]
                begin += count
        layers.append(LayerSurgery(layer, sum(counts), tuple(slots)))
    return SurgeryPlan(tuple(layers), top_k)


def read_choice(text: str) -> Choice:
    """`0,3,5`, `0-3,7`, or the path of a JSON file with a list or an object of lists. Raises `SurgeryError`."""
    if not text or not all(part.strip().replace("-", "", 1).isdigit() for part in text.split(",")):
        found = read_json(Path(text))
        if not isinstance(found, (list, dict)):
            raise SurgeryError(
                f"{text}: holds {type(found).__name__}; give a list, or lists by layer", code="bad_choice"
            )
        return found
    chosen: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        first, last = int(low), int(high or low)
        if last - first > 1 << 16:
            raise SurgeryError(f"{part}: that is {last - first + 1} experts; name fewer", code="bad_choice")
        chosen += range(first, last + 1)
    return chosen


def read_usage(path: Path) -> Mapping[str, Sequence[float]]:
    """A JSON object of a number for each expert by layer. Raises `SurgeryError`."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise SurgeryError(f"{path}: holds {type(found).__name__}; give lists by layer", code="bad_usage")
    return found


def read_json(path: Path) -> object:
    """A JSON document of a file. Raises `SurgeryError` (`bad_json`), OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"over {MAX_JSON_BYTES} bytes")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path}: not JSON ({error}); check the file", code="bad_json") from None
