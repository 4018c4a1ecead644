"""A sub-model of the experts that are kept: dense where one is left in every layer, a smaller mixture otherwise.

E experts before, S slots after. The result computes what the full model does when its gate may name none but the kept experts (their logits alone
enter the softmax). It is of a class of transformers where one holds it, with the config cut too: a config that still names the old number would make
`from_pretrained` fill the model up with random experts. Everything is a `SurgeryPlan`, as surgery of a checkpoint is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..routers import DenseRouter, ExpertChoiceRouter, GShardRouter, RandomRouter, SwitchRouter, TopKRouter
from ..surgery.plan import LayerSurgery, Slot, SurgeryPlan
from .blocks import MoEBlock, config_numbers, moe_blocks, parameter, set_parameter
from .classes import build, dense_blocks, dense_config, sparse_fields
from .ffns import DenseFFN, dense_ffns
from .layer import MixtureFFN, PlainFFN
from .layout import empty_table
from .slots import slot_rows
from .upcycle import copy_trunk


def extract(
    model: Any, experts: Mapping[str | int, Sequence[int]], *, merge: bool = False, top_k: int | None = None
) -> Any:
    """A new model with only the named experts; `model` stays as it is.

    Args:
        model: with mixtures, of a class of transformers or of moses's layer.
        experts: by block (its path `model.layers.3`, or its number) the experts to keep, in that order; a block that is not named keeps all.
        merge: average the kept experts of each named block to one FFN, which is an approximation.
        top_k: experts a token afterwards; None leaves it.

    Raises:
        SurgeryError: as `extract_plan` and `apply_extraction`.
    """
    return apply_extraction(model, extract_plan(model, experts, merge=merge, top_k=top_k))


def extract_plan(
    model: Any, experts: Mapping[str | int, Sequence[int]], *, merge: bool = False, top_k: int | None = None
) -> SurgeryPlan:
    """The plan of an extraction. One expert becomes a plain FFN wherever its weight would be 1 for every token.

    Raises:
        SurgeryError: `unknown_layer` for a block without experts, `unknown_expert`, `no_expert_left`, `top_k_too_large`; `cannot_merge` where
            the experts stand beside others or their weights do not sum to 1.
    """
    blocks = moe_blocks(model)
    by_name: dict[str | int, MoEBlock] = {name: block for block in blocks for name in (block.block, block.index)}
    parts = []
    for name, kept in experts.items():
        if name not in by_name:
            known = ", ".join(block.block for block in blocks) or "none"
            raise SurgeryError(f"{name!r} is no block with experts; those are {known}", code="unknown_layer")
        block = by_name[name]
        alone = stands_for_ffn(block)
        if merge and not alone:
            raise SurgeryError(
                f"{block.block}: its experts stand beside others or their weights do not sum to 1, so one FFN cannot stand for them; leave out merge",
                code="cannot_merge",
            )
        if merge and len(kept) > 1:
            slots: tuple[Slot, ...] = (Slot(tuple(kept), (1.0 / len(kept),) * len(kept)),)
        else:
            slots = tuple(Slot((expert,)) for expert in kept)
        parts.append(LayerSurgery(block.block, block.num_experts, slots, dense=alone and len(slots) == 1))
    plan = SurgeryPlan(tuple(parts), top_k)
    if top_k is None:
        for part in plan.layers:
            if not _uses_all(by_name[part.layer].module):
                SurgeryPlan((part,)).require_top_k(by_name[part.layer].top_k)
    return plan


def stands_for_ffn(block: MoEBlock) -> bool:
    """Whether one expert alone computes what an FFN does: no shared expert or FFN beside it, a weight of 1, and a formula that FFNs have."""
    if block.interleaved or (isinstance(block.module, MixtureFFN) and block.module.dense is not None):
        return False
    shared = [part for name in block.shared if not name.endswith("_gate") for part in _parameters(block, name)]
    if any(part.numel() for part in shared):
        return False
    gate: Any = getattr(block.module, "router", getattr(block.module, "gate", None))
    if hasattr(gate, "routed_scaling_factor") or isinstance(gate, ExpertChoiceRouter):
        return False
    return not isinstance(gate, TopKRouter) or (gate.scoring != "sigmoid" and gate.scale == 1.0)


def _parameters(block: MoEBlock, name: str) -> list[Tensor]:
    return list(block.module.get_submodule(name.removeprefix(block.path + ".")).parameters())


def _uses_all(module: nn.Module) -> bool:
    return isinstance(getattr(module, "router", None), (DenseRouter, ExpertChoiceRouter))


def apply_extraction(model: Any, plan: SurgeryPlan) -> Any:
    """A new model after a plan that keeps, averages and leaves out experts.

    Raises:
        SurgeryError: `plan_differs` where the plan is of another model; `needs_growth` for new experts, which this does not make;
            `groups_not_kept` where the gate chooses among groups of experts; `top_k_too_large`; `fixed_top_k` where the router has a k of its own.
    """
    blocks = {block.block: block for block in moe_blocks(model)}
    _require_fit(blocks, plan)
    dense = [blocks[part.layer] for part in plan.layers if part.dense]
    if any(isinstance(block.module, MixtureFFN) for block in blocks.values()):
        return _in_layers(model, plan)
    config = _class_config(model, blocks, plan)
    if config is None:
        return _in_layers(model, plan)
    made = build(config, model)
    copy_trunk(model, made, skip=tuple(block.path for block in blocks.values()))
    _fill(model, made, blocks, plan, {block.path for block in dense})
    return made


def _require_fit(blocks: Mapping[str, MoEBlock], plan: SurgeryPlan) -> None:
    for part in plan.layers:
        block = blocks.get(part.layer)
        if block is None or block.num_experts != part.before:
            raise SurgeryError(
                f"{part.layer}: the plan is of {part.before} experts, the model has {'none' if block is None else block.num_experts}",
                code="plan_differs",
            )
        if any(slot.new for slot in part.slots):
            raise SurgeryError(f"{part.layer}: the plan adds experts; grow the model instead", code="needs_growth")
        gate: Any = getattr(block.module, "router", getattr(block.module, "gate", None))
        groups = max(getattr(gate, "num_group", 1) or 1, getattr(gate, "num_groups", 1) or 1)
        if groups > 1 and not part.dense and not part.unchanged:
            raise SurgeryError(
                f"{part.layer}: its gate chooses among {groups} groups of experts; cutting them would change which groups are chosen",
                code="groups_not_kept",
            )
    slots = {part.layer: len(part.slots) for part in plan.layers if not part.dense}
    plain = {part.layer for part in plan.layers if part.dense}
    for name, block in blocks.items():
        if plan.top_k is None or name in plain or _uses_all(block.module):
            continue
        if slots.get(name, block.num_experts) < plan.top_k:
            raise SurgeryError(
                f"{name}: has {slots.get(name, block.num_experts)} experts and a token would use {plan.top_k}; lower top-k",
                code="top_k_too_large",
            )
        router = getattr(block.module, "router", None)
        if isinstance(router, (GShardRouter, SwitchRouter)) and plan.top_k != router.top_k:
            raise SurgeryError(
                f"{name}: {type(router).__name__} gives a token {router.top_k} experts, not {plan.top_k}; leave top_k out",
                code="fixed_top_k",
            )


def _class_config(model: Any, blocks: Mapping[str, MoEBlock], plan: SurgeryPlan) -> Any:
    """The config of a class of transformers that holds the result; None where none does."""
    surgery = {part.layer: part for part in plan.layers}
    dense = [block.index for name, block in blocks.items() if name in surgery and surgery[name].dense]
    numbers = {
        len(surgery[name].slots) if name in surgery else b.num_experts
        for name, b in blocks.items()
        if b.index not in dense
    }
    top_ks = {plan.top_k or block.top_k for block in blocks.values()}
    if len(dense) == len(blocks):
        return dense_config(model.config)[0]
    if len(numbers) != 1 or len(top_ks) != 1:
        return None
    config = copy.deepcopy(model.config)
    for name in config_numbers(config):
        setattr(config, name, next(iter(numbers)))
    config.num_experts_per_tok = top_ks.pop()
    if dense:
        if not hasattr(config, "mlp_only_layers"):
            return None
        if dense_blocks(config) and config.intermediate_size != config.moe_intermediate_size:
            return None
        config.intermediate_size = config.moe_intermediate_size
        sparse = [block.index for block in blocks.values() if block.index not in dense]
        for name, value in sparse_fields(sparse, config.num_hidden_layers).items():
            setattr(config, name, value)
    return config


@torch.no_grad()
def _fill(source: Any, made: Any, blocks: Mapping[str, MoEBlock], plan: SurgeryPlan, dense: set[str]) -> None:
    surgery = {part.layer: part for part in plan.layers}
    ffns = {ffn.path: ffn for ffn in dense_ffns_at(made, dense)}
    for name, block in blocks.items():
        part = surgery.get(name)
        if block.path in dense:
            assert part is not None
            ffns[block.path].load(*_fused(source, block, part.slots[0]))
            continue
        state = block.module.state_dict()
        for full in (*block.gate_tensors, *block.expert_tensors):
            local = full.removeprefix(block.path + ".")
            state[local] = state[local] if part is None else slot_rows(state[local], part.slots)
        made.get_submodule(block.path).load_state_dict(state)


def dense_ffns_at(model: Any, paths: set[str]) -> list[DenseFFN]:
    """The dense FFNs of these paths, whose weights are not there yet."""
    found = []
    for path in sorted(paths):
        module = model.get_submodule(path)
        for part in module.parameters():
            part.zero_()
    if paths:
        found = [ffn for ffn in dense_ffns(model) if ffn.path in paths]
    return found


def _fused(model: Any, block: MoEBlock, slot: Slot) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """into, out and their biases of one FFN, as `DenseFFN.load` takes them."""
    names = (block.into, block.out, block.into_bias, block.out_bias)
    found = [None if name is None else slot_rows(parameter(model, name).detach(), (slot,))[0] for name in names]
    into, out, *biases = found
    assert into is not None
    assert out is not None
    if block.transposed:
        into, out = into.T, out.T
    return into, out, biases[0], biases[1]


@torch.no_grad()
def _in_layers(model: Any, plan: SurgeryPlan) -> Any:
    """The same class with other modules in the places of its mixtures; plain where every place is an FFN of its own class again."""
    made = copy.deepcopy(model)
    blocks = {block.block: block for block in moe_blocks(made)}
    base: Any = _base(model) if any(part.dense for part in plan.layers) else None
    surgery = {part.layer: part for part in plan.layers}
    if plan.top_k is not None and hasattr(made.config, "num_experts_per_tok"):
        made.config.num_experts_per_tok = plan.top_k
    for name, block in blocks.items():
        part = surgery.get(name)
        own = isinstance(block.module, MixtureFFN)
        if part is None:
            if plan.top_k is not None and not _uses_all(block.module):
                block.set_numbers(block.num_experts, plan.top_k)
            continue
        if part.dense:
            tensors = _fused(made, block, part.slots[0])
            made.set_submodule(block.path, _ffn(block, tensors, base.get_submodule(block.path) if own else None))
            continue
        top_k = plan.top_k or block.top_k
        if _uses_all(block.module):
            top_k = len(part.slots)
        router = getattr(block.module, "router", None)
        if isinstance(router, ExpertChoiceRouter):
            router.capacity = min(router.capacity, float(top_k))
        if block.gate is None:
            _cut_table(block, part)
        for tensor in (*block.gate_tensors, *block.expert_tensors):
            set_parameter(made, tensor, slot_rows(parameter(made, tensor).detach(), part.slots))
        block.set_numbers(len(part.slots), top_k)
    return made


def _base(model: Any) -> Any:
    """The model's own class without weights, for the FFNs that its config describes."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return type(model)._from_config(model.config, dtype=model.dtype)


def _ffn(
    block: MoEBlock, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None], of_class: nn.Module | None
) -> nn.Module:
    into, out, into_bias, out_bias = tensors
    d_model, d_ff = out.shape
    experts: Any = block.module.experts
    kind: Literal["gate_up_down", "up_down"] = "gate_up_down" if into.shape[0] == 2 * d_ff else "up_down"
    activation = getattr(experts, "activation", None) or _activation(experts)
    if of_class is None:
        module: nn.Module = PlainFFN(d_model, d_ff, kind, activation, into_bias is not None).to(out.dtype)
        module.to(out.device)
    else:
        module = of_class.to_empty(device=out.device)
    ffn = DenseFFN(block.path, block.block, block.index, kind, activation, d_model, d_ff, 0.0, module)
    ffn.load(into, out, into_bias, out_bias)
    return module.train(block.module.training)


def _activation(experts: Any) -> str:
    from ..transformers import ACTIVATION_OF

    name = ACTIVATION_OF.get(type(experts.act_fn))
    if name is None:
        raise SurgeryError(
            f"{type(experts).__name__} has the activation {type(experts.act_fn).__name__}, which no plain FFN of moses has",
            code="not_upcyclable",
        )
    return name


def _cut_table(block: MoEBlock, part: LayerSurgery) -> None:
    """Keep the domains whose experts all stay, in their order, with the experts' new numbers."""
    router: Any = block.module.router
    assert isinstance(router, RandomRouter)
    place = torch.full((router.num_experts,), -1, dtype=torch.int64, device=router.table.device)
    for slot, kept in enumerate(part.slots):
        place[list(kept.sources)] = slot
    table = place[router.table]
    whole = (table >= 0).all(1)
    if not bool(whole.any()) or int(whole.sum()) * router.experts_per_group != len(part.slots):
        raise SurgeryError(
            f"{part.layer}: its table sends the tokens of a domain to {router.experts_per_group} experts; keep all experts of the domains "
            "that are kept, or one expert a layer by merge",
            code="groups_not_kept",
        )
    cut = empty_table(int(whole.sum()), table.shape[1], router.experts_per_group)
    cut.table = table[whole]
    block.module.router = cut
