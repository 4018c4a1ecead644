"""A bank whose masks select single weights of A and of B, by learned scores, as the paper has it.

The mask's gradient passes straight through to the scores, dL/ds = dL/d(theta * m) * theta (Kang, arXiv 2511.06237; the
straight-through estimator of Bengio et al., arXiv 1308.3432). The effective weight is where(used, frozen, free): a used
weight is read from a buffer, which no optimizer holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _core

SPACES = ("A", "B")


class ElementBank(nn.Module):
    """N experts of rank R beside a D_out x D_in map, masked weight by weight.

    Attributes:
        frozen_A, frozen_B: (N*R, D_in) and (N*R, D_out) buffers with the used weights' values, of `dtype`.
        free_A, free_B, score_A, score_B: the open task's parameters of the same shapes; None between tasks.
    """

    frozen_A: Tensor
    frozen_B: Tensor

    def __init__(self, d_out: int, d_in: int, num_experts: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_out, self.d_in, self.rank, self.num_experts = d_out, d_in, rank, num_experts
        self.dtype = dtype
        self.register_buffer("frozen_A", torch.zeros(num_experts * rank, d_in, dtype=dtype))
        self.register_buffer("frozen_B", torch.zeros(num_experts * rank, d_out, dtype=dtype))
        for kind in ("free", "score"):
            for space in SPACES:
                self.register_parameter(f"{kind}_{space}", None)
        self._masks: dict[int, dict[str, Tensor]] = {}
        # Of the open task: weights that are frozen, candidates among them, candidates that are free, and the present mask.
        self._used: dict[str, Tensor] = {}
        self._reused: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._mask: dict[str, Tensor] = {}
        self.open_task: int | None = None
        self.learning_masks = False

    @property
    def spaces(self) -> list[tuple[str, int, int]]:
        """(name, units an expert, bytes a unit) of each mask space, for the registry."""
        size = self.dtype.itemsize
        return [("A", self.rank * self.d_in, size), ("B", self.rank * self.d_out, size)]

    def open(
        self, task: int, fresh: dict[str, _core.Mask], reused: dict[str, _core.Mask], generator: torch.Generator
    ) -> None:
        """Make the `fresh` (free) and the `reused` (frozen) weights candidates of `task`."""
        self.open_task, self.learning_masks = task, True
        for space in SPACES:
            frozen = self._frozen(space)
            self._fresh[space] = mask_bits(fresh[space], frozen)
            self._reused[space] = mask_bits(reused[space], frozen)
            self._used[space] = ~self._fresh[space]
            self._mask[space] = self._fresh[space] | self._reused[space]
            bound = self.d_in**-0.5 if space == "A" else 0.0
            start = (torch.rand(frozen.shape, generator=generator) * 2 - 1) * bound
            scores = torch.rand(frozen.shape, generator=generator) * self.d_in**-0.5
            setattr(self, f"free_{space}", nn.Parameter(start.to(frozen.device)))
            setattr(self, f"score_{space}", nn.Parameter(scores.to(frozen.device)))

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """Scores of the free candidates, (F,) float32 a space."""
        return {space: getattr(self, f"score_{space}")[self._fresh[space]].float() for space in SPACES}

    @torch.no_grad()
    def reuse_importance(self) -> dict[str, Tensor]:
        """Scores of the frozen candidates, (U,) float32 a space."""
        return {space: getattr(self, f"score_{space}")[self._reused[space]].float() for space in SPACES}

    def select(self, kept: dict[str, Tensor], kept_reused: dict[str, Tensor]) -> None:
        """Make the marked candidates the open task's present mask; its scores go on learning."""
        for space in SPACES:
            mask = torch.zeros_like(self._mask[space])
            mask[self._fresh[space]] = kept[space].to(mask.device)
            mask[self._reused[space]] = kept_reused[space].to(mask.device)
            self._mask[space] = mask

    def hold(self) -> None:
        """Hold the present mask for good; only the free weights go on learning."""
        self.learning_masks = False
        for space in SPACES:
            getattr(self, f"score_{space}").requires_grad_(False)

    @torch.no_grad()
    def close(self) -> dict[str, _core.Mask]:
        """Copy the newly used weights into the frozen buffers; the task's masks."""
        masks = {}
        for space in SPACES:
            frozen, new = self._frozen(space), self._mask[space] & ~self._used[space]
            frozen[new] = getattr(self, f"free_{space}")[new].to(self.dtype).to(frozen)
            masks[space] = _core.Mask.from_bool(self._mask[space].flatten().cpu().numpy())  # type: ignore[arg-type]
        self.drop()
        return masks

    def drop(self) -> None:
        """Give up the open task's candidates."""
        for space in SPACES:
            setattr(self, f"free_{space}", None)
            setattr(self, f"score_{space}", None)
        self._used, self._reused, self._fresh, self._mask = {}, {}, {}, {}
        self.open_task, self.learning_masks = None, False

    def read(self, task: int, masks: dict[str, _core.Mask], num_experts: int) -> None:
        """Take `task`'s masks from the registry, for its forward; it was trained with `num_experts` experts."""
        rows = num_experts * self.rank
        self._masks[task] = {space: mask_bits(masks[space], self._frozen(space))[:rows] for space in SPACES}

    def forget(self, task: int) -> None:
        """Forget what `read` took for `task`."""
        self._masks.pop(task, None)

    def weights(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (rows, D_in), B (rows, D_out), zero where `task`'s mask is, and the expert (rows,) int64 of each row.

        A task that ended before the bank grew goes on with the rows it had, so that its products keep their shape and bits.
        """
        if task == self.open_task:
            A, B = self._open_weight("A"), self._open_weight("B")
        else:
            masks = self._masks[task]
            if masks["A"].device != self.frozen_A.device:
                masks.update({space: mask.to(self.frozen_A.device) for space, mask in masks.items()})
            rows = masks["A"].shape[0]
            A, B = self.frozen_A[:rows] * masks["A"], self.frozen_B[:rows] * masks["B"]
        return A, B, torch.arange(A.shape[0], device=A.device) // self.rank

    def _open_weight(self, space: str) -> Tensor:
        free, score, mask = getattr(self, f"free_{space}"), getattr(self, f"score_{space}"), self._mask[space]
        weight = torch.where(self._used[space], self._frozen(space), free.to(self.dtype).to(self._frozen(space).dtype))
        through = mask.to(weight.dtype)
        if self.learning_masks:
            through = through + (score - score.detach())
        return weight * through

    def width(self, task: int) -> int:
        """The rows that an expert has: R, since masks cut no rows."""
        return self.rank

    def grow(self, count: int) -> None:
        """Add `count` experts behind the present ones."""
        self.num_experts += count
        rows = count * self.rank
        self.frozen_A = torch.cat([self.frozen_A, self.frozen_A.new_zeros(rows, self.d_in)])
        self.frozen_B = torch.cat([self.frozen_B, self.frozen_B.new_zeros(rows, self.d_out)])

    def values(self, space: str, mask: _core.Mask) -> Tensor:
        """Frozen values of the units of `mask`, (units,) of `dtype` on the CPU, in the registry's order."""
        frozen = self._frozen(space)
        return frozen[mask_bits(mask, frozen)].to(self.dtype).cpu()

    @torch.no_grad()
    def load_values(self, space: str, mask: _core.Mask, values: Tensor) -> None:
        """Set the frozen values of the units of `mask` from what `values` gave."""
        frozen = self._frozen(space)
        frozen[mask_bits(mask, frozen)] = values.to(frozen)

    def _frozen(self, space: str) -> Tensor:
        return self.frozen_A if space == "A" else self.frozen_B


def mask_bits(mask: _core.Mask, like: Tensor) -> Tensor:
    """A mask as bool (rows, columns of `like`); fewer rows than `like` where the mask is older than the bank's growth."""
    bits = torch.frombuffer(bytearray(mask.to_bool()), dtype=torch.bool)
    return bits.reshape(-1, like.shape[1]).to(like.device)
