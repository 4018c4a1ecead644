"""What an attached model gives up when its budget is spent: the least useful rank components of its ended tasks.

The rule: a component is as useful as it is large (|a| |b| by its bytes, as when a task chooses what to keep) times the number of
tasks that use it; the least useful goes first, at a tie that of the lower layer and unit. It goes for every task that uses it. What stays keeps
its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _core
from .attached import MosesModel
from .subexperts import RankBank


def give_up_components(model: MosesModel, num_bytes: int) -> dict[str, float]:
    """Drop components of ended tasks until `num_bytes` are free, or none is left.

    Returns:
        For each task that lost some, the share of its components' size that it lost.
    """
    registry = model.registry
    layers = [(layer, bank) for layer, bank in model._layers() if isinstance(bank, RankBank)]
    sizes, uses = [], []
    for layer, bank in layers:
        counts = np.frombuffer(registry.reference_counts(layer.id, layer.spaces[0].name), "<u4").astype(np.int64)
        sizes.append(bank.stored_importance().cpu().double().numpy())
        uses.append(counts)
    dropped = _least_useful(sizes, uses, [layer.spaces[0].unit_bytes for layer, _ in layers], num_bytes)
    lost: dict[str, float] = {}
    for info in registry.tasks():
        narrowed: list[tuple[int, str, _core.Mask]] = []
        had, gone = 0.0, 0.0
        for (layer, _), size, drop in zip(layers, sizes, dropped, strict=True):
            space = layer.spaces[0].name
            mask = registry.mask(info.id, layer.id, space)
            units = np.frombuffer(mask.to_indices(), "<u8").astype(np.int64)
            had += float(size[units].sum())
            if drop[units].any():
                gone += float(size[units[drop[units]]].sum())
                narrowed.append((layer.id, space, _core.Mask.from_indices(mask.length, units[~drop[units]].tolist())))
        if narrowed:
            registry.narrow_task(info.id, narrowed)
            lost[info.name] = gone / had if had else 0.0
    for (layer, bank), drop in zip(layers, dropped, strict=True):
        if drop.any():
            gone_units = _core.Mask.from_indices(len(drop), np.flatnonzero(drop).tolist())
            values = gone_units.count * layer.spaces[0].unit_bytes // bank.dtype.itemsize
            bank.load_values(layer.spaces[0].name, gone_units, torch.zeros(values))
    owned: dict[int, Any] = dict(model.owned_values())
    for name in lost:
        task = registry.task(name).id
        model.read_task(task)
        registry.set_content_hash(task, registry.content_hash(task, owned))
    return lost


def _least_useful(
    sizes: list[np.ndarray[Any, np.dtype[np.float64]]],
    uses: list[np.ndarray[Any, np.dtype[np.int64]]],
    unit_bytes: list[int],
    num_bytes: int,
) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    """(units,) bool a layer: which used units go."""
    dropped = [np.zeros(len(size), bool) for size in sizes]
    flat = np.concatenate([size * use for size, use in zip(sizes, uses, strict=True)])
    used = np.flatnonzero(np.concatenate(uses) > 0)
    layer_of = np.repeat(np.arange(len(sizes)), [len(size) for size in sizes])
    first = np.cumsum([0, *(len(size) for size in sizes)])
    freed = 0
    for unit in used[np.argsort(flat[used], kind="stable")].tolist():
        if freed >= num_bytes:
            break
        layer = int(layer_of[unit])
        dropped[layer][unit - first[layer]] = True
        freed += unit_bytes[layer]
    return dropped
