"""How much a model's experts are used, and how much they add: counted by hooks over calibration batches.

E experts. `tokens` are the pairs (token, slot) that name an expert; `norm` is the mean over them of weight · ‖expert's output‖, the router-weighted
activation norm of REAP (Lasby et al., arXiv 2510.13999). Padding, by the attention mask, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MoELayer
from ..plan import DispatchPlan, dispatch_plan
from ..routes import RouterOutput
from .growing import GrowingLayer
from .mixtures import Mixture, mixtures


@dataclass(frozen=True, eq=False)
class Use:
    """Of one layer, on the CPU.

    Attributes:
        tokens: (E,) int64.
        norm: (E,) float64; 0 for an expert without tokens.
    """

    tokens: Tensor
    norm: Tensor


class _Count:
    """Hooks of one forward after the other, and their sums."""

    def __init__(self, found: list[Mixture], norms: bool) -> None:
        self.norms = norms
        self.mask: Tensor | None = None
        self.tokens = {part.block: torch.zeros(part.num_experts, dtype=torch.int64) for part in found}
        self.sums = {part.block: torch.zeros(part.num_experts, dtype=torch.float64) for part in found}

    def fused(self, block: str, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the experts of transformers, which are given tokens, ids and weights."""
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        x, ids, weights = given["hidden_states"], given["top_k_index"], given["top_k_weights"]
        x = x.reshape(-1, x.shape[-1])

        def output(expert: int, rows: Tensor) -> Tensor:
            chosen = torch.full((rows.shape[0], 1), expert, dtype=ids.dtype, device=ids.device)
            made: Tensor = experts.forward(x[rows], chosen, torch.ones_like(chosen, dtype=weights.dtype))
            return made

        self._add(block, ids, weights, output)

    def routed(self, block: str, experts: Any, _router: Any, args: tuple[Any, ...], output: RouterOutput) -> None:
        """After the router of a `MoELayer`, whose experts are given rows in a plan's order."""
        x = args[0].reshape(-1, args[0].shape[-1])

        def made(expert: int, rows: Tensor) -> Tensor:
            found: Tensor = experts(x[rows], self._plan(block, expert, rows))
            return found

        self._add(block, output.routes.expert_ids, output.routes.weights, made)

    def growing(self, block: str, layer: GrowingLayer, args: tuple[Any, ...], _output: Any) -> None:
        """After a growing layer."""
        x = args[0].reshape(-1, args[0].shape[-1])
        routes = layer.route(args[0]).routes

        def made(expert: int, rows: Tensor) -> Tensor:
            return layer.expert_rows(x[rows], self._plan(block, expert, rows))

        self._add(block, routes.expert_ids, routes.weights, made)

    def _plan(self, block: str, expert: int, rows: Tensor) -> DispatchPlan:
        ids = torch.full((rows.shape[0], 1), expert, device=rows.device)
        return dispatch_plan(ids, self.tokens[block].shape[0])

    def _add(self, block: str, ids: Tensor, weights: Tensor, output: Any) -> None:
        ids, weights = ids.detach(), weights.detach()
        keep = ids >= 0
        if self.mask is not None and self.mask.numel() == ids.shape[0]:
            keep &= self.mask.reshape(-1, 1).to(ids.device).bool()
        tokens, sums = self.tokens[block], self.sums[block]
        tokens += torch.bincount(ids[keep].cpu(), minlength=tokens.shape[0])[: tokens.shape[0]]
        if not self.norms:
            return
        for expert in range(tokens.shape[0]):
            rows, slot = torch.nonzero(keep & (ids == expert), as_tuple=True)
            if rows.numel():
                norms = output(expert, rows).double().norm(dim=-1)
                sums[expert] += (norms * weights[rows, slot].double()).sum().cpu()


@torch.no_grad()
def measure_use(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, norms: bool = False) -> dict[str, Use]:
    """The use of every mixture of `model` over `batches` (keyword arguments of its forward), by the block's path; labels are left out.

    Args:
        norms: compute `Use.norm` too, which costs each expert's product once more.
    """
    found = mixtures(model)
    count = _Count(found, norms)
    handles = []
    for part in found:
        module: Any = part.module
        if isinstance(module, GrowingLayer):
            handles.append(module.register_forward_hook(partial(count.growing, part.block)))
        elif isinstance(module, MoELayer):
            handles.append(module.router.register_forward_hook(partial(count.routed, part.block, module.experts)))
        else:
            handles.append(module.experts.register_forward_pre_hook(partial(count.fused, part.block), with_kwargs=True))
    training = model.training
    model.eval()
    try:
        for batch in batches:
            count.mask = batch.get("attention_mask")
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {block: Use(tokens, count.sums[block] / tokens.clamp(min=1)) for block, tokens in count.tokens.items()}
