"""Applies a `SurgeryPlan` to a model in memory, and to the optimizer that trains it: all of it or nothing.

An expert that is kept keeps its bits and its state in the optimizer (AdamW's two moments, and whatever else has a value for each weight); new and
averaged experts start from state 0. The number of steps, which is one for the whole tensor, stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..surgery.plan import SurgeryPlan
from .blocks import config_numbers
from .mixtures import Mixture, Replacement, mixtures, put

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")


def apply(model: nn.Module, plan: SurgeryPlan, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """Do what `plan` says to `model`, in place.

    Args:
        model: with the mixtures that the plan names.
        optimizer: of the model; its parameter groups and its state follow.

    Returns:
        A function that undoes it, bit for bit, while neither the model nor the optimizer has been changed since.

    Raises:
        SurgeryError: before anything has changed: a layer is not there (`unknown_layer`), has another number of experts (`plans_differ`), top-k is
            above what is left (`top_k_too_large`), or the class has one number for all layers and the plan leaves several (`uneven_layers`).
    """
    found = {part.block: part for part in mixtures(model)}
    after = _numbers(found, plan)
    replacements = [
        replacement
        for part in plan.layers
        if not part.unchanged
        for replacement in found[part.layer].prepare(model, part, plan)
    ]
    before = [Replacement(r.owner, r.name, r.before) for r in replacements]
    saved = None if optimizer is None else _Optimizer(optimizer)
    numbers = {block: (part.num_experts, part.top_k) for block, part in found.items()}
    for old, new in zip(before, replacements, strict=True):
        if saved is not None:
            saved.move(old.value, new)
        elif isinstance(old.value, nn.Parameter) and isinstance(new.value, nn.Parameter):
            _move_gradient(old.value, new)
        put(new)
    _set_numbers(model, found, after)

    def undo() -> None:
        for replacement in before:
            put(replacement)
        _set_numbers(model, found, numbers)
        if saved is not None:
            saved.restore()

    return undo


def _numbers(found: dict[str, Mixture], plan: SurgeryPlan) -> dict[str, tuple[int, int]]:
    """(E, k) of every mixture after the plan."""
    for part in plan.layers:
        if part.layer not in found:
            names = ", ".join(found) or "none"
            raise SurgeryError(
                f"the model has no experts at {part.layer}; it has them at {names}", code="unknown_layer"
            )
        count = found[part.layer].num_experts
        if part.before != count:
            raise SurgeryError(
                f"{part.layer}: has {count} experts and the plan starts from {part.before}", code="plans_differ"
            )
    slots = {part.layer: len(part.slots) for part in plan.layers}
    after = {}
    for block, mixture in found.items():
        num_experts, top_k = slots.get(block, mixture.num_experts), plan.top_k or mixture.top_k
        # a growing layer with fewer experts than k uses all of them
        if num_experts < top_k and mixture.form is not None:
            raise SurgeryError(
                f"{block}: {num_experts} experts would be left and a token uses {top_k}; keep more, or lower top-k",
                code="top_k_too_large",
            )
        groups, asked = mixture.groups
        if num_experts % groups or top_k > asked * (num_experts // groups) or (groups > 1 and num_experts < 2 * groups):
            raise SurgeryError(
                f"{block}: {num_experts} experts would not make {groups} equal groups of two or more, {asked} of which a token may use; keep or "
                f"add a multiple of {groups}",
                code="uneven_groups",
            )
        after[block] = num_experts, top_k
    counts = {after[block][0] for block, mixture in found.items() if mixture.uniform}
    if len(counts) > 1:
        raise SurgeryError(
            f"the model's class has one number of experts for all layers and these would be {sorted(counts)}; cut or grow all layers alike",
            code="uneven_layers",
        )
    return after


def _set_numbers(model: nn.Module, found: dict[str, Mixture], after: dict[str, tuple[int, int]]) -> None:
    for block, (num_experts, top_k) in after.items():
        found[block].set_numbers(num_experts, top_k)
    uniform = [after[block] for block, mixture in found.items() if mixture.uniform]
    config: Any = getattr(model, "config", None)
    if not uniform or config is None:
        return
    num_experts, top_k = uniform[0]
    text = config.get_text_config()
    for name in config_numbers(text):
        setattr(text, name, num_experts)
    if hasattr(text, "num_experts_per_tok"):
        text.num_experts_per_tok = top_k
    for module in model.modules():  # the model's head keeps them for its balance loss
        for name, value in (*((name, num_experts) for name in _NUMBERS), ("num_experts_per_tok", top_k)):
            if isinstance(module.__dict__.get(name), int) and hasattr(module, "config"):
                setattr(module, name, value)


class _Optimizer:
    """An optimizer whose parameters are being replaced, and what it was before."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.state = dict(optimizer.state)

    def move(self, old: Tensor | None, new: Replacement) -> None:
        """Let the new tensor stand where the old one stood; one that had no predecessor joins the first group."""
        groups = self.optimizer.param_groups
        holder = next((group for group in groups if any(p is old for p in group["params"])), None)
        if not isinstance(new.value, nn.Parameter):
            if holder is not None:
                holder["params"] = [p for p in holder["params"] if p is not old]
        elif holder is not None:
            holder["params"] = [new.value if p is old else p for p in holder["params"]]
        elif old is None:
            groups[0]["params"] = [*groups[0]["params"], new.value]
        if not isinstance(old, nn.Parameter):
            return
        state = self.optimizer.state.pop(old, None)
        if isinstance(new.value, nn.Parameter) and new.state is not None:
            _move_gradient(old, new)
            if state is not None:
                self.optimizer.state[new.value] = {
                    key: new.state(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }

    def restore(self) -> None:
        """Be as before."""
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"] = parameters
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _move_gradient(old: nn.Parameter, new: Replacement) -> None:
    """The gradient that is there already, where a step is made of several batches."""
    if old.grad is not None and new.value is not None and new.state is not None:
        new.value.grad = new.state(old.grad)
