"""What every router's arithmetic keeps to: float32 or wider, no autocast, and finite logits (the op `moses::finite_logits`).

The check is an op, so that torch.compile calls it where it would otherwise trace into a branch on data. Its result is a copy, for an op may not
return its input and a check without a result would be taken for dead code: one pass over (T, E), beside the T·E·D of the gate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off on x's device, where the device has any."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def router_dtype(x: Tensor) -> torch.dtype:
    """What a router computes in: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_finite(logits: Tensor, router: str = "the router") -> Tensor:
    """`logits` (..., E) as they are; `router` names it in the message.

    Raises:
        ModelError: one is NaN or infinite (`router_not_finite`, with its token). On CUDA an asynchronous assert: nothing waits.
    """
    checked: Tensor = torch.ops.moses.finite_logits(logits, router)
    return checked


def require_finite(logits: Tensor, router: str) -> None:
    """Raise as `check_finite` does; for the inside of an op."""
    if logits.numel() and logits.device.type != "meta":
        # NaN passes through both; several times as fast as isfinite of every logit
        least, most = logits.aminmax()
        if logits.device.type != "cpu":
            torch._assert_async(least.isfinite() & most.isfinite(), "a router's logits are not finite")
        elif not (bool(least.isfinite()) and bool(most.isfinite())):
            token = int((~logits.isfinite().all(-1)).flatten().nonzero()[0])
            raise ModelError(
                f"the logits of {router} are not finite at token {token}: the activations overflow; lower the learning rate or use a wider dtype",
                code="router_not_finite",
            )


def _finite_logits(logits: Tensor, router: str) -> Tensor:
    require_finite(logits, router)
    return logits.clone()


def _fake(logits: Tensor, router: str) -> Tensor:
    return torch.empty_like(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


torch.library.define("moses::finite_logits", "(Tensor logits, str router) -> Tensor")
torch.library.impl("moses::finite_logits", "CompositeExplicitAutograd")(_finite_logits)
torch.library.register_fake("moses::finite_logits", _fake)
torch.library.register_autograd("moses::finite_logits", _gradient)
