"""The task's router: which experts of the banks in a block a token uses, and with what weight.

MoSEs (Kang, arXiv 2511.06237) routes with a matrix a task, p_t(x) = softmax(W_t x), keeps the top k and renormalises. One
router serves all linear maps of a block and works in a small fixed random space of the block's input, since a matrix of
N x D_in a linear map costs more bytes than a rank-1 LoRA of that map. Arithmetic is float32 (float64 for float64 input).
Ties go to the lower expert id.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import TaskContext
from ..routes import RouterOutput, Routes, expert_load
from ..seeds import stable_seed
from .finite import no_autocast, router_dtype
from .gate import gate_logits
from .topk_of import stable_topk

TOKEN_SPREAD = 0.1  # deviation of a fresh router's weights on the token, beside 1 of its bias


def topk_gates(logits: Tensor, top_k: int) -> Tensor:
    """Renormalised top-k of the softmax, as a dense matrix.

    Args:
        logits: (..., N) float32 or float64.
        top_k: experts a token uses; at most N.

    Returns:
        (..., N) of the same dtype: zero for the experts not used, and a row sums to 1. Equal logits go to the lower expert.
    """
    probabilities = logits.softmax(-1)
    if top_k >= logits.shape[-1]:
        return probabilities
    values, experts = stable_topk(probabilities, top_k)
    return torch.zeros_like(probabilities).scatter(-1, experts, values / values.sum(-1, keepdim=True))


class TaskRouter(nn.Module):
    """Routers of all tasks at one place of the model, over `dim` input features.

    `frozen` holds the ended tasks' rows (a buffer, in no optimizer), `weight` the open task's.

    Attributes:
        projection: (dim, router_dim) fixed random map from a seed, or None where routers see the input itself.
        frozen: (slots, N, width) float32; `slots` maps a task's id to its row and to its number of experts. The last column is
            the bias, so that a task may prefer experts whatever the token.
    """

    projection: Tensor | None
    frozen: Tensor
    weight: nn.Parameter | None

    def __init__(
        self,
        name: str,
        dim: int,
        num_experts: int,
        top_k: int,
        router_dim: int | None,
        seed: int,
        context: TaskContext,
    ) -> None:
        super().__init__()
        self.name, self.top_k, self.context, self.seed = name, top_k, context, seed
        self.num_experts = num_experts
        self.width = (dim if router_dim is None else router_dim) + 1
        generator = torch.Generator().manual_seed(seed)
        projection = None if router_dim is None else torch.randn(dim, router_dim, generator=generator) * dim**-0.5
        self.register_buffer("projection", projection)
        self.register_buffer("frozen", torch.zeros(0, num_experts, self.width))
        self.register_parameter("weight", None)
        self.slots: dict[int, tuple[int, int]] = {}

    def open(self, task: int, like: int | None = None) -> None:
        """Give the open task a router of its own, started from task `like`'s where there is one.

        A fresh router prefers some experts by its bias and looks at the token only a little: with a random preference a token, each
        expert would learn from a random part of the tokens.
        """
        generator = torch.Generator().manual_seed(stable_seed(self.seed, task))
        start = torch.randn(self.num_experts, self.width, generator=generator).to(self.frozen.device)
        start[:, :-1] *= TOKEN_SPREAD
        if like is not None:
            start[: self.slots[like][1]] = self.task_weight(like)
        self.weight = nn.Parameter(start)

    def close(self, task: int | None) -> None:
        """Move the open task's router to the buffer as `task`'s; None drops it."""
        if task is not None:
            assert self.weight is not None, "the router has no open task"
            self.load(task, self.weight.detach())
        self.weight = None

    def load(self, task: int, weight: Tensor) -> None:
        """Set `task`'s frozen router to `weight` (N, width)."""
        row = torch.zeros(1, self.num_experts, self.width, dtype=self.frozen.dtype, device=self.frozen.device)
        row[0, : weight.shape[0]] = weight
        self.slots[task] = (self.frozen.shape[0], weight.shape[0])
        self.frozen = torch.cat([self.frozen, row])

    def forget(self, task: int) -> None:
        """Remove `task`'s router."""
        slot, _ = self.slots.pop(task)
        keep = [row for row in range(self.frozen.shape[0]) if row != slot]
        self.frozen = self.frozen[keep]
        self.slots = {other: (row - (row > slot), count) for other, (row, count) in self.slots.items()}

    def grow(self, num_experts: int) -> None:
        """Make room for `num_experts` experts; ended tasks go on with the experts they had."""
        self.frozen = F.pad(self.frozen, (0, 0, 0, num_experts - self.num_experts))
        self.num_experts = num_experts

    def task_weight(self, task: int) -> Tensor:
        """(N, width) float32 router of an ended task, or of the open one."""
        if task == self.context.open_task:
            assert self.weight is not None, "the router has no open task"
            return self.weight
        slot, count = self.slots[task]
        return self.frozen[slot, :count]

    def forward(self, x: Tensor) -> RouterOutput:
        """Route (batch, ..., dim) tokens, each row of the batch for the task that the context has it in.

        Rows in no group are the base model's: their slots name nobody, and their logits are -inf, as is the logit of an expert that came
        after the row's task.

        Raises:
            ModelError: a logit is NaN or infinite (`router_not_finite`; on CUDA an asynchronous assert).
        """
        batch, inner, dtype = x.shape[0], x.shape[1:-1], router_dtype(x)
        ids = torch.full((batch, *inner, self.top_k), -1, dtype=torch.int64, device=x.device)
        weights = torch.zeros(ids.shape, dtype=dtype, device=x.device)
        logits = torch.full((batch, *inner, self.num_experts), float("-inf"), dtype=dtype, device=x.device)
        for group in self.context.groups:
            part = group.take(x)
            rows = slice(None) if group.rows is None else group.rows.to(x.device)
            found = self._choice(part, group.task)
            for whole, values in zip((ids, weights, logits), found, strict=True):
                whole[rows, ..., : values.shape[-1]] = values
            self._count(group.task, found[0], found[2].shape[-1])
        ids = ids.flatten(0, -2)
        routes = Routes(ids, weights.flatten(0, -2), may_skip=True)
        return RouterOutput(routes, logits.flatten(0, -2), expert_load(ids, self.num_experts))

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gates of every group of the context for `x` (batch, ..., dim), as the banks take them: a tuple of (group's rows, ..., N).

        Raises:
            ModelError: as `forward`.
        """
        return tuple(self._gates(group.take(x), group.task) for group in self.context.groups)

    def route(self, x_TD: Tensor, task: int) -> RouterOutput:
        """Route (T, dim) tokens for one task.

        Raises:
            ModelError: as `forward`.
        """
        ids, weights, logits = self._choice(x_TD, task)
        self._count(task, ids, logits.shape[-1])
        return RouterOutput(Routes(ids, weights), logits, expert_load(ids, self.num_experts))

    def _choice(self, x: Tensor, task: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits(x, task)
        values, ids = stable_topk(logits.softmax(-1), min(self.top_k, logits.shape[-1]))
        return ids, values / values.sum(-1, keepdim=True), logits

    def _gates(self, x: Tensor, task: int) -> Tensor:
        logits = self._logits(x, task)
        gates = topk_gates(logits, self.top_k)
        if self.context.counts is not None:
            self._add_counts(task, (gates.detach() > 0).flatten(0, -2).sum(0).cpu())
        return gates

    def _count(self, task: int, expert_ids: Tensor, num_experts: int) -> None:
        if self.context.counts is not None:
            self._add_counts(task, expert_load(expert_ids, num_experts).cpu())

    def _add_counts(self, task: int, used: Tensor) -> None:
        assert self.context.counts is not None
        key = (task, self.name)
        self.context.counts[key] = self.context.counts.get(key, 0) + used

    def _logits(self, x: Tensor, task: int) -> Tensor:
        with no_autocast(x):
            x = x.to(router_dtype(x))
            # Standardised, so that a block's depth (the residual stream grows with it) does not set the router's temperature.
            x = F.layer_norm(x, x.shape[-1:])
            if self.projection is not None:
                x = gate_logits(x, self.projection.to(x.dtype).T, None, f"router {self.name}")
            weight = self.task_weight(task).to(x.dtype)
            return gate_logits(x, weight[:, :-1], weight[:, -1], f"router {self.name}")
