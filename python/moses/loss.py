"""Losses on routing: returned to whoever asked, kept nowhere.

T tokens, E experts. Sums are in the dtype of what is given, float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_variation(values: Tensor) -> Tensor:
    """CV(v)² = Var(v) / Mean(v)² of (E,) values: the form of both losses of Shazeer et al. (arXiv 1701.06538, equations 6 to 11)."""
    if values.shape[0] == 1:
        return values.new_zeros(())
    # Zero where no token was routed; a constant added to the mean would change the loss of few tokens and many experts.
    return values.var(correction=0) / values.mean().square().clamp(min=torch.finfo(values.dtype).tiny)


def importance_loss(gates_TE: Tensor) -> Tensor:
    """CV² of each expert's importance, the sum of its gates over the batch (arXiv 1701.06538, equations 6 and 7)."""
    return squared_variation(gates_TE.sum(0))


def balance_loss(probabilities_TE: Tensor, load_E: Tensor) -> Tensor:
    """E · Σ_i f_i · P_i (Switch, Fedus et al., arXiv 2101.03961, equations 4 to 6), 1 for perfect balance.

    f_i is the share of routed pairs that expert i was given (no gradient flows through it), P_i its mean probability.

    Args:
        probabilities_TE: softmax over experts, (T, E).
        load_E: (E,) pairs given to each expert.
    """
    num_tokens, num_experts = probabilities_TE.shape
    share = load_E.to(probabilities_TE.dtype) / load_E.sum().clamp(min=1)
    mean = probabilities_TE.sum(0) / max(num_tokens, 1)
    return num_experts * (share * mean).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of (log Σ exp logits)²: keeps logits small (ST-MoE, Zoph et al., arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(-1).square().sum() / max(logits_TE.shape[0], 1)


def normal_cdf(x: Tensor) -> Tensor:
    """Φ, the standard normal distribution function."""
    return 0.5 * (1.0 + torch.erf(x * 0.5**0.5))


def distillation_loss(old_logits_NV: Tensor, new_logits_NV: Tensor) -> Tensor:
    """Mean over N tokens of KL(old ‖ new) in nats, in float32 or wider; 0 for no tokens (Lifelong-MoE, arXiv 2305.12281, section 3.3).

    Args:
        old_logits_NV: (N, V) of the model before; no gradient flows to it.
        new_logits_NV: (N, V) of the model in training.
    """
    dtype = torch.promote_types(new_logits_NV.dtype, torch.float32)
    old = old_logits_NV.detach().to(dtype).log_softmax(-1)
    new = new_logits_NV.to(dtype).log_softmax(-1)
    return (old.exp() * (old - new)).sum() / max(new.shape[0], 1)
