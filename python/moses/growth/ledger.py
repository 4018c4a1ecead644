"""A registry in which experts have gone from every task: the same history again, with smaller masks.

Ids are given by the order of what happened, so the same events give every layer, expert and task the id that it had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from .. import _core
from ..errors import FormatError

_EVENTS = {
    "layer": re.compile(r"layer (\d+) added with (\d+) experts"),
    "experts": re.compile(r"(\d+) experts added to layer (\d+)"),
    "begun": re.compile(r"task (\d+) begun"),
    "ended": re.compile(r"task (\d+) ended"),
    "abandoned": re.compile(r"task (\d+) abandoned"),
    "forgotten": re.compile(r"task (\d+) forgotten"),
}


def without_experts(registry: _core.Registry, gone: Mapping[int, frozenset[int]]) -> _core.Registry:
    """The registry without the experts `gone`, by a layer's id their places in it, in any task's masks. Content hashes are not carried over.

    Raises:
        FormatError: the history is of a kind that this does not know (`unknown_event`).
    """
    layers = {info.id: info for info in registry.layers()}
    tasks = {info.id: info for info in registry.tasks()}
    made = _core.Registry()
    for line in registry.history():
        kind, numbers = _event(line)
        if kind == "layer":
            info = layers[numbers[0]]
            spaces = [(space.name, space.units_per_expert, space.unit_bytes) for space in info.spaces]
            made.add_layer(info.name, numbers[1], spaces)
        elif kind == "experts":
            made.add_experts(numbers[1], numbers[0])
        elif kind == "begun":
            task = tasks.get(numbers[0])
            made.begin_task(*((task.name, task.domain) if task else (f"forgotten {numbers[0]}", None)))
        elif kind == "ended":
            task = tasks.get(numbers[0])
            made.end_task(numbers[0], [] if task is None else _masks(registry, made, numbers[0], gone))
        elif kind == "abandoned":
            made.abandon_task(numbers[0])
        else:
            made.forget_task(numbers[0])
    return made


def _event(line: str) -> tuple[str, list[int]]:
    for kind, pattern in _EVENTS.items():
        found = pattern.fullmatch(line)
        if found:
            return kind, [int(number) for number in found.groups()]
    raise FormatError(f"the registry's history has {line!r}, which this moses does not know", code="unknown_event")


def _masks(
    registry: _core.Registry, made: _core.Registry, task: int, gone: Mapping[int, frozenset[int]]
) -> list[tuple[int, str, _core.Mask]]:
    masks = []
    for info in made.layers():  # as long as they were when the task ended
        for space in info.spaces:
            units = np.frombuffer(registry.mask(task, info.id, space.name).to_indices(), "<u8")
            lost = list(gone.get(info.id, ()))
            kept = units[~np.isin(units // space.units_per_expert, lost)]
            masks.append((info.id, space.name, _core.Mask.from_indices(space.length, kept)))
    return masks
