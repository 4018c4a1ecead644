"""A mixture of small FFN experts beside a frozen FFN (the figure of MoSEs, Kang, arXiv 2511.06237).

    y = ffn(x) + (alpha / R) * sum over the token's top k experts n of gate_n(x) * up_n(gelu(down_n x))

An expert is a bottleneck as in Houlsby et al. (arXiv 1902.00751), without biases and beside the FFN instead of behind it. A hidden
neuron, its row of down with its column of up, is what a task's mask selects, so an expert has as many neurons as the task took of it.
Tokens go to their experts and back by plan, gather and combine; each expert sees its own rows only.

What holds of its bits: they depend on the task's own masks, values and router, and on the rows that are answered for the task in one
batch (as a product's bits depend on how many rows it has), never on other tasks, nor on experts that came later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import TaskContext
from ..experts import compute_dtype
from ..ops import combine, gather, grouped_linear
from ..plan import dispatch_plan
from ..routers import TaskRouter
from ..routers.topk_of import stable_topk
from .layer import Bank, Gates, SubExpertLayer

ALIGNMENT = 8  # neurons: the 16-byte strides that grouped products on CUDA ask of 16-bit floats


def mixture(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, gates: Tensor, *, width: int, top_k: int, scale: float = 1.0
) -> Tensor:
    """scale * sum over n of gate_n(x) * up_n(gelu(down_n x)), by dispatch.

    Args:
        x: (..., D) floats.
        down, up: (C, D), the two halves of C hidden neurons.
        experts: (C,) int64, the expert of each neuron, in any order; an expert may have none.
        gates: (..., N) float32 or float64, zero for all but `top_k` experts of a token.
        width: at least the most neurons of an expert.
        top_k: experts a token uses.
        scale: factor of the result.

    Returns:
        (..., D) of x's dtype, or autocast's.
    """
    num_experts, dtype = gates.shape[-1], compute_dtype(x)
    weights, expert_ids = stable_topk(gates.reshape(-1, num_experts), min(top_k, num_experts))
    plan = dispatch_plan(expert_ids, num_experts)
    width = -(-width // ALIGNMENT) * ALIGNMENT
    places = _places(experts, width)
    down, up = (_by_expert(units, places, num_experts, width).to(dtype) for units in (down, up))
    rows = gather(x.reshape(-1, x.shape[-1]).to(dtype), plan)
    hidden = F.gelu(grouped_linear(rows, down, plan.offsets))
    rows = grouped_linear(hidden, up, plan.offsets, transposed=True)
    return combine(rows, plan, weights * scale).reshape(x.shape)


def _places(experts: Tensor, width: int) -> Tensor:
    """(C,) row of each neuron where every expert has `width` rows, its neurons in the order in which they come."""
    ranked, order = torch.sort(experts, stable=True)
    turn = torch.arange(len(experts), device=experts.device) - torch.searchsorted(ranked, ranked)
    return torch.empty_like(order).index_copy(0, order, ranked * width + turn)


def _by_expert(units: Tensor, places: Tensor, num_experts: int, width: int) -> Tensor:
    """(N, width, D) from (C, D): zeros where an expert has fewer neurons."""
    whole = units.new_zeros(num_experts * width, units.shape[1])
    return whole.index_copy(0, places, units).reshape(num_experts, width, units.shape[1])


class SubExpertFFN(SubExpertLayer):
    """An FFN plus the mixture of the context's tasks.

    In BERT-like models, whose blocks compute LayerNorm(dropout(output.dense(intermediate(x))) + x), `base_layer` is the module `output`,
    called with the hidden layer and x. The mixture of x is added to the x that it is given: parallel to both maps of the FFN, before the
    residual sum and its LayerNorm, as in the families whose FFN is one module.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        bank: Bank,
        scale: float,
        context: TaskContext,
        gates: Gates,
        router: TaskRouter | None,
        top_k: int,
    ) -> None:
        super().__init__(base_layer, bank, scale, context, gates, router)
        self.top_k = top_k

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (batch, ..., D) to (batch, ..., D); in BERT-like models x (batch, ..., F) is the hidden layer, `residual` (batch, ..., D) its input."""
        if residual is None:
            return self.add_update(self.base_layer(x), x)
        y: Tensor = self.base_layer(x, self.add_update(residual, residual))
        return y

    def _update(self, y: Tensor, x: Tensor, task: int, gates: Tensor) -> Tensor:
        down, up, experts = self.bank.weights(task)
        if down.shape[0] == 0:
            return y
        width = self.bank.width(task)
        return y + mixture(x, down, up, experts, gates, width=width, top_k=self.top_k, scale=self.scale).to(y.dtype)
