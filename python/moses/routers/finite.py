"""The check that a router's logits are finite: the op `moses::finite_logits`.

An op, so that torch.compile calls the check where it would otherwise trace into a branch on data. Its result is a copy, for an op may not
return its input and a check without a result would be taken for dead code: one pass over (T, E), beside the T·E·D of the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError


def check_finite(logits: Tensor, router: str = "the router") -> Tensor:
    """`logits` (..., E) as they are; `router` names it in the message.

    Raises:
        ModelError: one is NaN or infinite (`router_not_finite`, with its token). On CUDA an asynchronous assert: nothing waits.
    """
    checked: Tensor = torch.ops.moses.finite_logits(logits, router)
    return checked


def _finite_logits(logits: Tensor, router: str) -> Tensor:
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
    return logits.clone()


def _fake(logits: Tensor, router: str) -> Tensor:
    return torch.empty_like(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


torch.library.define("moses::finite_logits", "(Tensor logits, str router) -> Tensor")
torch.library.impl("moses::finite_logits", "CompositeExplicitAutograd")(_finite_logits)
torch.library.register_fake("moses::finite_logits", _fake)
torch.library.register_autograd("moses::finite_logits", _gradient)
