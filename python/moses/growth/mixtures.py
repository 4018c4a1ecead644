"""Every mixture of a model that surgery can change: transformers' blocks, `MoELayer`, `GrowingLayer`, behind one face.

E experts, S slots of a plan. Surgery is prepared first, as a list of replacements of tensors, and made when all of them are there: what goes wrong
goes wrong before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..moe import MoELayer
from ..surgery.plan import LayerSurgery, Slot, SurgeryPlan
from ..targets import block_of
from .blocks import MoEBlock, describe, moe_blocks, parameter
from .growing import GrowingLayer
from .slots import slot_rows, slot_state

MASKED = -1e4  # selection bias of a gate row that is never chosen


@dataclass(frozen=True, eq=False)
class Replacement:
    """A tensor of a module that is put in another's place.

    Attributes:
        owner, name: the module and its attribute.
        value: what is put there; None takes it away.
        state: makes an optimizer's state of the new tensor from one of the old one, of the same shape; None where there was none.
    """

    owner: nn.Module
    name: str
    value: Tensor | None
    state: Callable[[Tensor], Tensor] | None = None

    @property
    def before(self) -> Tensor | None:
        """What is there now."""
        found: Tensor | None = getattr(self.owner, self.name)
        return found


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of experts in a model.

    Attributes:
        block: as in `LayerSurgery.layer`.
        module: the mixture.
        num_experts, top_k: E and k.
        form: how transformers or `MoELayer` has it; None for a `GrowingLayer`.
    """

    block: str
    module: nn.Module
    num_experts: int
    top_k: int
    form: MoEBlock | None = None

    @property
    def uniform(self) -> bool:
        """Whether the class has one number of experts for all layers."""
        return not isinstance(self.module, (GrowingLayer, MoELayer))

    @property
    def groups(self) -> tuple[int, int]:
        """Into how many equal groups the gate puts its experts, and how many of these a token may use (DeepSeek-V3); (1, 1) without groups."""
        router = next((getattr(self.module, name) for name in ("gate", "router") if hasattr(self.module, name)), None)
        for owner in (self.module, router):
            for number, asked in (("n_group", "topk_group"), ("num_group", "topk_group"), ("num_groups", "top_groups")):
                if isinstance(getattr(owner, number, None), int) and isinstance(getattr(owner, asked, None), int):
                    return getattr(owner, number), getattr(owner, asked)
        return 1, 1

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The experts' own tensors, with the experts on axis 0; detached."""
        if isinstance(self.module, GrowingLayer):
            return {name: part for name, part in self.module.expert_tensors().items() if name != "gate"}
        assert self.form is not None
        return {name: parameter(model, name).detach() for name in self.form.expert_tensors}

    def bytes_per_expert(self, model: nn.Module) -> int:
        """Bytes of an expert with its gate row."""
        tensors = list(self.tensors(model).values())
        if isinstance(self.module, GrowingLayer):
            tensors += [] if self.module.gate is None else [self.module.gate]
        elif self.form is not None:
            tensors += [parameter(model, name) for name in self.form.gate_tensors]
        return sum(int(tensor[0].numel()) * tensor.element_size() for tensor in tensors)

    def prepare(self, model: nn.Module, part: LayerSurgery, plan: SurgeryPlan) -> list[Replacement]:
        """The replacements that do `part`. Raises `SurgeryError` where it cannot be done."""
        if part.dense:
            raise SurgeryError(
                f"{part.layer}: a model in memory keeps its gate; extract it to a dense folder", code="bad_plan"
            )
        if isinstance(self.module, GrowingLayer):
            return _prepare_growing(self.module, part, plan)
        assert self.form is not None
        return _prepare_fused(model, self.form, part, plan)

    def set_numbers(self, num_experts: int, top_k: int) -> None:
        """Write E and k where the module has them."""
        if self.form is not None:
            self.form.set_numbers(num_experts, top_k)
        else:
            self.module.top_k = top_k  # type: ignore[assignment]


def mixtures(model: nn.Module) -> list[Mixture]:
    """The mixtures of `model`, in its own order. Raises `SurgeryError` (`unknown_mixture`) for one in an unknown form."""
    forms = {block.path: block for block in moe_blocks(model)}
    found = []
    for path, module in model.named_modules():
        if isinstance(module, GrowingLayer):
            found.append(Mixture(block_of(path, model) or path, module, module.num_experts, module.top_k))
        elif path in forms or isinstance(module, MoELayer):
            form = forms.get(path) or describe(model, path, path, 0)
            found.append(Mixture(form.block, module, form.num_experts, form.top_k, form))
    return found


def _prepare_fused(model: nn.Module, form: MoEBlock, part: LayerSurgery, plan: SurgeryPlan) -> list[Replacement]:
    if form.gate is None:
        raise SurgeryError(
            f"{part.layer}: a table routes its tokens; only experts with gate rows can be changed", code="no_gate"
        )
    masked = plan.new_rows == "masked" and any(slot.new for slot in part.slots)
    if masked and form.selection_bias is None:
        raise SurgeryError(
            f"{part.layer}: its gate has no selection bias, so new rows cannot be masked; use new_rows='copy'",
            code="cannot_mask",
        )
    made = []
    for name in (*form.expert_tensors, *form.gate_tensors):
        before = parameter(model, name)
        matrix = name in (form.into, form.out)
        inputs = -1 if name == form.gate or matrix else None
        inputs = -2 if matrix and form.transposed else inputs
        rows = slot_rows(before.detach(), part.slots, plan.seed, name, inputs=inputs)
        if masked and name == form.selection_bias:
            rows[[slot.new for slot in part.slots]] = MASKED
        made.append(_replaced(model, name, before, rows, part.slots))
    return made


def _replaced(model: nn.Module, name: str, before: Tensor, rows: Tensor, slots: tuple[Slot, ...]) -> Replacement:
    owner = model.get_submodule(name.rpartition(".")[0])
    value = nn.Parameter(rows, before.requires_grad) if isinstance(before, nn.Parameter) else rows
    return Replacement(owner, name.rpartition(".")[2], value, lambda state: slot_state(state, slots))


def _prepare_growing(layer: GrowingLayer, part: LayerSurgery, plan: SurgeryPlan) -> list[Replacement]:
    if plan.new_rows == "masked":
        raise SurgeryError(
            f"{part.layer}: new rows are masked by visible(), not by a bias; use new_rows='copy'", code="cannot_mask"
        )
    border = layer.num_frozen
    is_frozen = [slot.kept and slot.sources[0] < border for slot in part.slots]
    frozen = [slot for slot, old in zip(part.slots, is_frozen, strict=True) if old]
    free = [slot for slot, old in zip(part.slots, is_frozen, strict=True) if not old]
    if is_frozen != sorted(is_frozen, reverse=True):
        raise SurgeryError(
            f"{part.layer}: frozen experts stand before free ones; put the kept ones first", code="bad_plan"
        )
    # what an optimizer knows of the free experts, by their places among these
    known = [Slot((slot.sources[0] - border,)) if slot.kept else Slot(new=True) for slot in free]
    made = []
    for name, whole in layer.expert_tensors().items():
        kept = [slot.sources[0] for slot in frozen]
        rows = slot_rows(whole, free, plan.seed, part.layer, name) if free else None
        made.append(Replacement(layer, name, getattr(layer, name)[kept].clone()))
        value = None if rows is None else nn.Parameter(rows)
        made.append(Replacement(layer, f"free_{name}", value, lambda state: slot_state(state, known)))
    if layer.gate is None and layer.tables.shape[0]:
        made.append(Replacement(layer, "tables", _moved_tables(layer, part)))
    return made


def _moved_tables(layer: GrowingLayer, part: LayerSurgery) -> Tensor:
    place = torch.full((part.before,), -1, dtype=torch.int16)
    for slot_number, slot in enumerate(part.slots):
        for source in slot.sources:
            if not slot.new:
                place[source] = slot_number
    moved = place.to(layer.tables.device)[layer.tables.long()]
    if bool((moved < 0).any()):
        lost = int(layer.tables[moved < 0][0])
        raise SurgeryError(
            f"{part.layer}: expert {lost} has token ids of a domain; take the whole domain out", code="expert_in_use"
        )
    return moved


def put(replacement: Replacement) -> None:
    """Make a replacement."""
    owner: Any = replacement.owner
    if replacement.name in owner._buffers:
        owner._buffers[replacement.name] = replacement.value
    else:
        owner.register_parameter(replacement.name, replacement.value)
