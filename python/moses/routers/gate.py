"""The gate's product with the check that its logits are finite: the op `moses::gate`.

The same bits for any number of threads. MKL, torch's BLAS on x86, splits the sum over D between threads where it finds that faster (in 244
of 684 shapes tried with D of 512 and more, torch 2.15), and a last bit is enough to change a route. On the CPU the product therefore
runs on one thread: T·E·D of it, beside some 6·T·k·F·D of the experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .finite import no_autocast, require_finite


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None, router: str = "the router") -> Tensor:
    """x · Wᵀ + b.

    Args:
        x: (..., D) float32 or float64.
        weight: (E, D) of x's dtype.
        bias: (E,) of x's dtype.
        router: the name for messages.

    Returns:
        (..., E) finite logits.

    Raises:
        ModelError: one is NaN or infinite (`router_not_finite`, with its token). On CUDA an asynchronous assert: nothing waits.
    """
    logits: Tensor = torch.ops.moses.gate(x, weight, bias, router)
    return logits


def _gate(x: Tensor, weight: Tensor, bias: Tensor | None, router: str) -> Tensor:
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or threads == 1:
        logits = F.linear(x, weight, bias)
    else:
        torch.set_num_threads(1)
        try:
            logits = F.linear(x, weight, bias)
        finally:
            torch.set_num_threads(threads)
    require_finite(logits, router)
    return logits


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, router: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    with no_autocast(grad):
        rows = grad.reshape(-1, grad.shape[-1])
        to_x = grad @ weight if needs[0] else None
        to_weight = rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        to_bias = rows.sum(0) if ctx.has_bias and needs[2] else None
    return to_x, to_weight, to_bias, None


torch.library.define("moses::gate", "(Tensor x, Tensor weight, Tensor? bias, str router) -> Tensor")
torch.library.impl("moses::gate", "CompositeExplicitAutograd")(_gate)
torch.library.register_fake("moses::gate", _fake)
torch.library.register_autograd("moses::gate", _gradient, setup_context=_save)
