"""Rows of tokens to rows of experts, the experts' linear maps, and back, as torch ops: `gather`, `grouped_ffn` and
`grouped_linear`, `combine`.

T tokens, k slots a token, P rows of the plan, D width. All ops take the plan's `order` (P,) and `inverse` (T·k,), both int32 or both int64
and contiguous; -1 in `order` is an empty row, -1 in `inverse` a dropped pair. Rows are float32, bfloat16, float16 or float64; `acc` is float64
for float64 rows and float32 for the others, and weights are `acc`.

    moses::gather(Tensor x, Tensor order, Tensor inverse, int top_k) -> Tensor
        x (T, D) -> (P, D) of x's dtype: out[j] = x[order[j] // k], zeros where order[j] is -1. Bytes are copied, NaNs too.
    moses::gather_backward(Tensor grad, Tensor order, Tensor inverse, int top_k) -> Tensor
        grad (P, D) -> (T, D) of grad's dtype: out[t] = Σ_s grad[inverse[t·k + s]].
    moses::combine(Tensor y, Tensor order, Tensor inverse, Tensor weights) -> Tensor
        y (P, D), weights (T, k) acc -> (T, D) of y's dtype: out[t] = Σ_s weights[t, s] · y[inverse[t·k + s]].
    moses::combine_backward_y(Tensor grad, Tensor order, Tensor inverse, Tensor weights) -> Tensor
        grad (T, D), weights (T, k) acc -> (P, D) of grad's dtype: out[j] = weights.flat[order[j]] · grad[order[j] // k], zeros where empty.
    moses::combine_backward_weights(Tensor grad, Tensor y, Tensor order, Tensor inverse, int top_k) -> Tensor
        grad (T, D), y (P, D) of one dtype -> (T, k) acc: out[t, s] = Σ_d grad[t, d] · y[inverse[t·k + s], d], zero where dropped.

The five are closed under differentiation: the gradient of each is made of the others. Arithmetic is the same for every kernel, so that results
are equal to the bit: a row is widened to acc; a sum over slots starts at +0 and adds slot 0, 1, ... in turn, a dropped slot adds nothing; a
product is rounded before it is added (no fused multiply-add); the result is rounded once, to nearest even. The sum over d has 32 lanes: lane l
starts at +0 and adds the products of d = l, l + 32, ... in turn, then lanes fold by halves, lane[l] += lane[l + h] for h = 16, 8, 4, 2, 1.

A kernel for another device is `torch.library.impl("moses::gather", "cuda")(function)`: outputs are fresh and contiguous, inputs may have any
strides. Without one the reference, in plain torch, serves every device. The experts' ops are in `moses.ops.grouped` and `moses.ops.ffn`.
"""

from __future__ import annotations

from .activations import ACTIVATIONS
from .combine import combine, combine_reference
from .ffn import grouped_ffn, grouped_ffn_reference, hide
from .gather import gather, gather_reference
from .grouped import grouped_linear, grouped_linear_reference

__all__ = [
    "ACTIVATIONS",
    "combine",
    "combine_reference",
    "gather",
    "gather_reference",
    "grouped_ffn",
    "grouped_ffn_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "hide",
]
