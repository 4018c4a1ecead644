"""The k largest of a row, ties to the lower id, and the check that a router's logits are finite.

`torch.topk` promises no order among equals; `max` promises the first. k passes of it cost less than a sort of all experts as
long as k is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError

_MANY = 16  # from here on one stable sort is cheaper than k passes


def stable_topk(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order; equal ones in the order of their ids.

    Args:
        scores: (..., E) floats, finite or -inf; at least k of a row finite.
        top_k: k, at most E.

    Returns:
        Values and int64 ids, (..., k). Gradient flows through the values.
    """
    if top_k > _MANY:
        ranked = torch.sort(scores, dim=-1, descending=True, stable=True)
        return ranked.values[..., :top_k], ranked.indices[..., :top_k]
    left, ids = scores.detach(), []
    for slot in range(top_k):
        best = left.max(dim=-1, keepdim=True).indices
        ids.append(best)
        if slot + 1 < top_k:
            left = left.scatter(-1, best, float("-inf"))
    found = torch.cat(ids, dim=-1)
    return scores.gather(-1, found), found


def check_finite(logits: Tensor, router: str = "the router") -> Tensor:
    """`logits` (T, E) as they are; `router` names it in the message.

    Raises:
        ModelError: one is NaN or infinite (`router_not_finite`, with its token). On CUDA an asynchronous assert: nothing waits.
    """
    checked: Tensor = torch.ops.moses.finite_logits(logits, router)
    return checked


def _finite_logits(logits: Tensor, router: str) -> Tensor:
    finite = torch.isfinite(logits)
    if logits.device.type != "cpu":
        if logits.device.type != "meta":
            torch._assert_async(finite.all(), "a router's logits are not finite")
    elif not bool(finite.all()):
        token = int((~finite.all(-1)).flatten().nonzero()[0])
        raise ModelError(
            f"the logits of {router} are not finite at token {token}: the activations overflow; lower the learning rate or use a wider dtype",
            code="router_not_finite",
        )
    return logits.clone()


def _fake(logits: Tensor, router: str) -> Tensor:
    return torch.empty_like(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


# An op, so that torch.compile calls the check instead of tracing into a branch on data.
torch.library.define("moses::finite_logits", "(Tensor logits, str router) -> Tensor")
torch.library.impl("moses::finite_logits", "CompositeExplicitAutograd")(_finite_logits)
torch.library.register_fake("moses::finite_logits", _fake)
torch.library.register_autograd("moses::finite_logits", _gradient)
