"""Activations of experts by transformers' names, each with kernels that write into memory that is there already.

Fresh memory costs more than the arithmetic of an activation, so the experts' products and activations reuse a block that stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation; calling it is differentiable.

    Attributes:
        function: x to act(x).
        write: (x, out): out = act(x).
        write_gradient: (grad, x, out): out = grad · act'(x); out may not be grad or x.
        sigmoid: (a, b) where act(x) = x · σ(a·x + b·x³): the core has a kernel for a gate of that form.
    """

    function: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]
    write_gradient: Callable[[Tensor, Tensor, Tensor], object]
    sigmoid: tuple[float, float] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """act(x)."""
        return self.function(x)


def _gelu(approximate: str, sigmoid: tuple[float, float] | None = None) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x, out: aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
        sigmoid,
    )


def _relu2(x: Tensor, out: Tensor) -> None:
    torch.clamp(x, min=0, out=out)
    out.square_()


def _relu2_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.clamp(x, min=0, out=out)
    out.mul_(grad).mul_(2)


_silu = Activation(
    F.silu,
    lambda x, out: aten.silu.out(x, out=out),
    lambda grad, x, out: aten.silu_backward.grad_input(grad, x, grad_input=out),
    (1.0, 0.0),
)
# (1 + tanh(z / 2)) / 2 = σ(z)
_gelu_tanh = _gelu("tanh", ((8 / math.pi) ** 0.5, 0.044715 * (8 / math.pi) ** 0.5))
ACTIVATIONS = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu("none"),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": Activation(
        F.relu,
        lambda x, out: torch.clamp(x, min=0, out=out),
        lambda grad, x, out: aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "relu2": Activation(lambda x: F.relu(x).square(), _relu2, _relu2_gradient),
    "linear": Activation(
        lambda x: x,
        lambda x, out: out.copy_(x),
        lambda grad, x, out: out.copy_(grad),
    ),
}
