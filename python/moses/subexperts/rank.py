"""A bank whose masks select whole rank components: unit j is row A[j] with row B[j], and belongs to expert j // R.

Beside an FFN a component is a hidden neuron: A[j] is its row of down, B[j] its column of up.

Structured masks cost next to nothing on disk, and a task computes only with the components it uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _core

SPACE = "components"


@dataclass
class _View:
    """Units of one task, ascending, the expert of each: (C,) int64, and the most units of an expert."""

    units: Tensor
    experts: Tensor
    width: int


@dataclass
class _Candidates:
    """What the open task may use: free units (F,) ascending, frozen units (U,) ascending, which of the free ones are kept, and the
    most units that an expert then has."""

    fresh: Tensor
    reused: Tensor
    kept: Tensor
    width: int = 0


class RankBank(nn.Module):
    """N experts of rank R beside a D_out x D_in map, masked by component.

    Attributes:
        dtype: of the values that tasks own. It stays when the model is moved to another dtype.
        frozen_A, frozen_B: (N*R, D_in) and (N*R, D_out) buffers with the used components' values.
        free_A, free_B: the open task's candidates, (F, D_in) and (F, D_out) float32 parameters; None between tasks.
    """

    frozen_A: Tensor
    frozen_B: Tensor
    free_A: nn.Parameter | None
    free_B: nn.Parameter | None

    def __init__(self, d_out: int, d_in: int, num_experts: int, rank: int, candidates: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_out, self.d_in, self.rank, self.num_experts, self.candidates = d_out, d_in, rank, num_experts, candidates
        self.dtype = dtype
        self.register_buffer("frozen_A", torch.zeros(num_experts * rank, d_in, dtype=dtype))
        self.register_buffer("frozen_B", torch.zeros(num_experts * rank, d_out, dtype=dtype))
        self.register_parameter("free_A", None)
        self.register_parameter("free_B", None)
        self._views: dict[int, _View] = {}
        self._candidates: _Candidates | None = None
        self.open_task: int | None = None

    @property
    def spaces(self) -> list[tuple[str, int, int]]:
        """(name, units an expert, bytes a unit) of each mask space, for the registry."""
        return [(SPACE, self.rank, (self.d_in + self.d_out) * self.dtype.itemsize)]

    def open(
        self, task: int, fresh: dict[str, _core.Mask], reused: dict[str, _core.Mask], generator: torch.Generator
    ) -> None:
        """Make `candidates` of the `fresh` (free) components candidates of `task`, on top of the frozen `reused` ones.

        A starts as in PEFT's LoRA, uniform within 1/sqrt(D_in); B starts at zero, so the update starts at the reused part.
        """
        device = self.frozen_A.device
        self.open_task = task
        units = self._spread(mask_units(fresh[SPACE], device))
        kept = torch.arange(len(units), device=device)
        self._candidates = _Candidates(units, mask_units(reused[SPACE], device), kept)
        self._measure(self._candidates)
        start = (torch.rand(len(units), self.d_in, generator=generator) * 2 - 1) * self.d_in**-0.5
        self.free_A = nn.Parameter(start.to(device))
        self.free_B = nn.Parameter(torch.zeros(len(units), self.d_out, device=device))

    def _spread(self, free: Tensor) -> Tensor:
        """The candidates among the free units, ascending: every expert's first, then every expert's second, and so on."""
        experts = free // self.rank
        turn = torch.arange(len(free), device=free.device) - torch.searchsorted(experts, experts)
        return free[torch.sort(turn, stable=True).indices[: self.candidates]].sort().values

    @torch.no_grad()
    def reuse_importance(self) -> dict[str, Tensor]:
        """As `importance`, of the frozen candidates: (U,) float32."""
        reused = self._opened()[0].reused
        return {SPACE: self._size_of(self.frozen_A[reused], self.frozen_B[reused])}

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """Of every candidate: |a| |b| / sqrt(D_in + D_out), (F,) float32, so that it compares by bytes across maps."""
        _, A, B = self._opened()
        return {SPACE: self._size_of(A, B)}

    @torch.no_grad()
    def stored_importance(self) -> Tensor:
        """As `importance`, of every component in the buffers, (N * R,) float32."""
        return self._size_of(self.frozen_A, self.frozen_B)

    def _size_of(self, A: Tensor, B: Tensor) -> Tensor:
        size: Tensor = A.float().norm(dim=1) * B.float().norm(dim=1) / (self.d_in + self.d_out) ** 0.5
        return size

    def select(self, kept: dict[str, Tensor], kept_reused: dict[str, Tensor]) -> None:
        """Keep only the candidates marked in `kept` (F,) and `kept_reused` (U,) bool."""
        candidates = self._opened()[0]
        candidates.kept = torch.nonzero(kept[SPACE]).flatten().to(self.frozen_A.device)
        candidates.reused = candidates.reused[kept_reused[SPACE].to(candidates.reused.device)]
        self._measure(candidates)

    def _measure(self, candidates: _Candidates) -> None:
        candidates.width = self._width(torch.cat([candidates.reused, candidates.fresh[candidates.kept]]))

    def _width(self, units: Tensor) -> int:
        return int(torch.bincount(units // self.rank, minlength=1).max())

    def hold(self) -> None:
        """Hold the present selection for good; components are selected once, so there is nothing to stop."""

    @torch.no_grad()
    def close(self) -> dict[str, _core.Mask]:
        """Copy the kept candidates into the frozen buffers; the task's masks, reused units included."""
        candidates, A, B = self._opened()
        new = candidates.fresh[candidates.kept]
        self.frozen_A[new] = A[candidates.kept].to(self.dtype).to(self.frozen_A)
        self.frozen_B[new] = B[candidates.kept].to(self.dtype).to(self.frozen_B)
        units = torch.cat([candidates.reused, new]).cpu().tolist()
        self.drop()
        return {SPACE: _core.Mask.from_indices(self.num_experts * self.rank, sorted(units))}

    def drop(self) -> None:
        """Give up the open task's candidates."""
        self.free_A = self.free_B = self._candidates = self.open_task = None

    def _opened(self) -> tuple[_Candidates, Tensor, Tensor]:
        assert self._candidates is not None and self.free_A is not None and self.free_B is not None, "no task is open"
        return self._candidates, self.free_A, self.free_B

    def read(self, task: int, masks: dict[str, _core.Mask], num_experts: int) -> None:
        """Take `task`'s masks from the registry, for its forward; it was trained with `num_experts` experts."""
        units = mask_units(masks[SPACE], self.frozen_A.device)
        self._views[task] = _View(units, units // self.rank, self._width(units))

    def forget(self, task: int) -> None:
        """Forget what `read` took for `task`."""
        self._views.pop(task, None)

    def weights(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (C, D_in), B (C, D_out) and the expert (C,) int64 of each component that `task` uses, in training or not."""
        if task == self.open_task:
            candidates, free_A, free_B = self._opened()
            reused, kept = candidates.reused, candidates.kept
            # rounded as they will be frozen: what is trained is what answers
            A = torch.cat([self.frozen_A[reused], free_A[kept].to(self.dtype).to(self.frozen_A.dtype)])
            B = torch.cat([self.frozen_B[reused], free_B[kept].to(self.dtype).to(self.frozen_B.dtype)])
            return A, B, torch.cat([reused, candidates.fresh[kept]]) // self.rank
        view = self._views[task]
        if view.units.device != self.frozen_A.device:
            view.units, view.experts = view.units.to(self.frozen_A.device), view.experts.to(self.frozen_A.device)
        return self.frozen_A[view.units], self.frozen_B[view.units], view.experts

    def width(self, task: int) -> int:
        """The most components of `task` that one expert has; known without a look at a device."""
        if task == self.open_task:
            return self._opened()[0].width
        return self._views[task].width

    def grow(self, count: int) -> None:
        """Add `count` experts behind the present ones."""
        self.num_experts += count
        rows = count * self.rank
        self.frozen_A = torch.cat([self.frozen_A, self.frozen_A.new_zeros(rows, self.d_in)])
        self.frozen_B = torch.cat([self.frozen_B, self.frozen_B.new_zeros(rows, self.d_out)])

    def values(self, space: str, mask: _core.Mask) -> Tensor:
        """Frozen values of the units of `mask`, (units * (D_in + D_out),) of `dtype` on the CPU, in the registry's order."""
        units = mask_units(mask, self.frozen_A.device)
        return torch.cat([self.frozen_A[units], self.frozen_B[units]], dim=1).flatten().to(self.dtype).cpu()

    @torch.no_grad()
    def load_values(self, space: str, mask: _core.Mask, values: Tensor) -> None:
        """Set the frozen values of the units of `mask` from what `values` gave."""
        units = mask_units(mask, self.frozen_A.device)
        rows = values.reshape(len(units), self.d_in + self.d_out).to(self.frozen_A)
        self.frozen_A[units], self.frozen_B[units] = rows[:, : self.d_in], rows[:, self.d_in :]


def mask_units(mask: _core.Mask, device: torch.device) -> Tensor:
    """Ascending unit numbers of a mask, (units,) int64."""
    if not mask.count:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.frombuffer(bytearray(mask.to_indices()), dtype=torch.int64).to(device)
