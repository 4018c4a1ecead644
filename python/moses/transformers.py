"""`import moses.transformers` registers the experts implementation "moses" with transformers.

    import moses.transformers
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="moses")

Serves every MoE class of transformers whose experts go through its `ExpertsInterface`: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and
V3, GptOss. Tokens are sorted by a `DispatchPlan`, experts computed by `moses.ops.grouped_linear` on the fused weights, results combined in a
fixed order in float32: the same from run to run, for any number of threads. Experts with transformers' own gate and one of our activations are
one op, `grouped_ffn`; the others (GptOss: biases, a clamped gate of its own) two `grouped_linear`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import compute_dtype
from .ops import ACTIVATIONS, combine, gather, grouped_ffn, grouped_linear
from .plan import DispatchPlan, dispatch_plan

NAME = "moses"
# transformers makes an object of its own for every layer: the class says which activation it is
ACTIVATION_OF = {type(ACT2FN[name]): name for name in reversed(ACTIVATIONS) if name in ACT2FN}


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a fused experts module of transformers.

    Args:
        self: with `gate_up_proj` or `up_proj`, `down_proj`, their biases, and the flags that `use_experts_implementation` sets.
        hidden_states: (T, D).
        top_k_index: (T, k) integers; under expert parallelism E and above name experts of other ranks.
        top_k_weights: (T, k) floats.

    Returns:
        (T, D) of hidden_states' dtype.
    """
    num_experts, ids = self.num_experts, top_k_index
    if self._is_expert_parallel:
        ids, num_experts = ids.clamp(max=num_experts), num_experts + 1
    plan = dispatch_plan(ids, num_experts)
    rows = gather(hidden_states.to(compute_dtype(hidden_states)), plan)
    y = _fused(self, rows, plan) if _can_fuse(self) else _composed(self, rows, plan, ids)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    weights = top_k_weights
    if self._is_expert_parallel:
        weights = weights.masked_fill(top_k_index >= self.num_experts, 0.0)
    return combine(y, plan, weights).to(hidden_states.dtype)


def _can_fuse(self: Any) -> bool:
    own_gate = not self.has_gate or type(self)._apply_gate is getattr(moe, "_default_apply_gate", None)
    return own_gate and not self.has_bias and type(self.act_fn) in ACTIVATION_OF


def _fused(self: Any, rows: Tensor, plan: DispatchPlan) -> Tensor:
    into, out = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    return grouped_ffn(
        rows,
        into.to(rows.dtype),
        out.to(rows.dtype),
        plan.offsets[: self.num_experts + 1],
        ACTIVATION_OF[type(self.act_fn)],
        gated=self.has_gate,
        transposed=self.is_transposed,
    )


def _composed(self: Any, rows: Tensor, plan: DispatchPlan, ids: Tensor) -> Tensor:
    offsets, dtype = plan.offsets[: self.num_experts + 1], rows.dtype
    expert_of_row = ids.reshape(-1)[plan.order].clamp(max=self.num_experts - 1) if self.has_bias else None

    def project(rows: Tensor, weight: str) -> Tensor:
        y = grouped_linear(rows.to(dtype), getattr(self, weight).to(dtype), offsets, transposed=self.is_transposed)
        return y if expert_of_row is None else y + getattr(self, weight + "_bias").to(dtype)[expert_of_row]

    hidden = project(rows, "gate_up_proj" if self.has_gate else "up_proj")
    return project(self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden), "down_proj")


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

__all__ = ["NAME", "experts_forward"]
