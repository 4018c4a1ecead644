"""The dispatch plan: which row of the experts' input each routed token becomes, and back.

A plan is a stable counting sort of the T·k pairs (token, slot) by expert: by expert, then token, then slot. It is the same on every
device, for any number of threads and from run to run. Capacity follows GShard (Lepikhin et al., arXiv 2006.16668, algorithm 1): an
expert takes its first `capacity` pairs in that order, the rest are dropped.

Op: `moses::dispatch_plan(Tensor expert_ids, int num_experts, int? capacity, bool pad) -> (Tensor order, Tensor inverse, Tensor
offsets, Tensor counts)`, with shapes and dtypes as in `DispatchPlan`. No output's shape depends on the data, so nothing waits for a
device and torch.compile needs no graph break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, overload

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeVar

from . import _core
from .buffers import empty, integers
from .cuda import kernels
from .errors import DispatchError

__all__ = ["DispatchPlan", "dispatch_plan", "dispatch_plan_reference"]

Array = TypeVar("Array", bound="Tensor | np.ndarray[Any, Any]", default=Tensor)

MAX_EXPERTS = 1 << 24  # the same cap as the core's: counts of that many experts are 128 MiB
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ARRAY_DTYPES = frozenset(map(np.dtype, (np.int64, np.int32, np.int16, np.int8, np.uint8)))


@dataclass(frozen=True, eq=False, repr=False)
class DispatchPlan(Generic[Array]):
    """A stable permutation of routed tokens by expert. Immutable: its arrays are not to be written to.

    P, the number of rows, is T·k without a capacity; min(T·k, E·capacity) where tokens over the capacity are dropped; E·capacity where
    the experts' rows are padded to it.

    Attributes:
        order: (P,) int32, int64 where T·k or P is 2^31 or more; row j is the pair `order[j] = token·top_k + slot`; -1 where the row is
            empty: behind an expert's rows when padded, from `offsets[-1]` on when tokens were dropped.
        inverse: (T·k,) of order's dtype; the row of each pair; -1 where it was dropped.
        offsets: (E + 1,) int64; rows `offsets[e] : offsets[e + 1]` are expert e's.
        counts: (E,) int64; pairs that each expert takes, never over the capacity.
        num_tokens: T.
        top_k: k.
        num_experts: E.
        capacity: pairs an expert takes at most; None without a limit.
        padded: whether every expert has exactly `capacity` rows.
    """

    order: Array
    inverse: Array
    offsets: Array
    counts: Array
    num_tokens: int
    top_k: int
    num_experts: int
    capacity: int | None = None
    padded: bool = False

    @property
    def num_rows(self) -> int:
        """P, the rows that the experts see, empty ones included."""
        return self.order.shape[0]

    @property
    def num_dropped(self) -> int:
        """Pairs (token, slot) that no expert takes, since they are over its capacity. Waits for the device."""
        if self.capacity is None:
            return 0
        return self.num_tokens * self.top_k - int(self.counts.sum())

    @property
    def bytes(self) -> int:
        """Bytes of the four arrays."""
        return sum(int(array.nbytes) for array in (self.order, self.inverse, self.offsets, self.counts))

    def __repr__(self) -> str:
        kind = f"{self.counts.device}" if isinstance(self.counts, Tensor) else "numpy"
        limit = "" if self.capacity is None else f", capacity={self.capacity} ({'pad' if self.padded else 'drop'})"
        head = f"num_tokens={self.num_tokens}, top_k={self.top_k}, num_experts={self.num_experts}{limit}, rows={self.num_rows}"
        if type(self.counts) not in (Tensor, np.ndarray) or kind == "meta":
            return f"DispatchPlan({head}, {kind})"
        counts = torch.as_tensor(self.counts.tolist())
        load = f"load {int(counts.min())} to {int(counts.max())}, {int((counts == 0).sum())} idle"
        dropped = "" if self.capacity is None else f", {self.num_dropped} dropped"
        return f"DispatchPlan({head}, {load}{dropped}, {self.bytes:,} bytes, {kind})"


def num_rows(pairs: int, num_experts: int, capacity: int | None, pad: bool) -> int:
    """P of a plan of `pairs` = T·k routed pairs."""
    if capacity is None:
        return pairs
    return num_experts * capacity if pad else min(pairs, num_experts * capacity)


def index_dtype(pairs: int, rows: int) -> torch.dtype:
    """The dtype of `order` and `inverse`: half the bytes wherever 32 bits are enough."""
    return torch.int32 if pairs < 2**31 and rows < 2**31 else torch.int64


def dispatch_plan_reference(
    expert_ids: Tensor, num_experts: int, capacity: int | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan in plain torch on any device, and what every kernel has to equal; never waits for the device.

    Takes what the op takes. Ids out of range are a `DispatchError` on the CPU and an asynchronous assert elsewhere.
    """
    flat = expert_ids.reshape(-1).long()
    pairs, device = flat.shape[0], flat.device
    rows = num_rows(pairs, num_experts, capacity, pad)
    dtype = index_dtype(pairs, rows)
    check_ids(flat, num_experts, expert_ids.shape[1])
    sorted_ids, order = torch.sort(flat, stable=True)
    experts = torch.arange(num_experts, device=device)
    starts = torch.searchsorted(sorted_ids, experts)
    counts = torch.searchsorted(sorted_ids, experts, right=True) - starts
    if capacity is None:
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=device))
        return order.to(dtype), inverse.to(dtype), offsets, counts
    counts = counts.clamp(max=capacity)
    width = torch.full_like(counts, capacity) if pad else counts
    offsets = torch.nn.functional.pad(width.cumsum(0), (1, 0))
    rank = torch.arange(pairs, device=device) - starts[sorted_ids]
    kept = rank < capacity
    row = offsets[sorted_ids] + rank
    inverse = torch.empty_like(order).scatter_(0, order, row.where(kept, -1))
    # Dropped pairs all write one row past the end, which is cut off.
    padded = torch.full((rows + 1,), -1, device=device).scatter_(0, row.where(kept, rows), order)
    return padded[:rows].to(dtype), inverse.to(dtype), offsets, counts


def check_ids(flat: Tensor, num_experts: int, top_k: int) -> None:
    """Raise `DispatchError` (`expert_id_range`) at the first id that is not in [0, E); off the CPU an asynchronous assert."""
    bad = (flat < 0) | (flat >= num_experts)
    if flat.device.type != "cpu":
        if flat.device.type != "meta":
            torch._assert_async(~bad.any(), "moses.dispatch_plan: an expert id is not in [0, num_experts)")
    elif bool(bad.any()):
        pair = int(bad.nonzero()[0])
        raise DispatchError(
            f"token {pair // top_k}, slot {pair % top_k} names expert {int(flat[pair])} of {num_experts}: ids go from 0 to num_experts - 1",
            code="expert_id_range",
        )


torch.library.define(
    "moses::dispatch_plan",
    "(Tensor expert_ids, int num_experts, int? capacity, bool pad) -> (Tensor order, Tensor inverse, Tensor offsets, Tensor counts)",
)
torch.library.impl("moses::dispatch_plan", "CompositeExplicitAutograd")(dispatch_plan_reference)


def _plan_cpu(
    expert_ids: Tensor, num_experts: int, capacity: int | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = expert_ids.shape[0] * expert_ids.shape[1]
    if index_dtype(pairs, num_rows(pairs, num_experts, capacity, pad)) != torch.int32:
        return dispatch_plan_reference(expert_ids, num_experts, capacity, pad)
    return _planned(integers(expert_ids.contiguous()), num_experts, capacity, pad)


def _planned(
    expert_ids: Any, num_experts: int, capacity: int | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan of a contiguous array of ids of one of the core's dtypes, read where they are; fewer than 2^31 pairs and rows."""
    pairs = expert_ids.shape[0] * expert_ids.shape[1]
    order, inverse = (empty((size,), torch.int32) for size in (num_rows(pairs, num_experts, capacity, pad), pairs))
    offsets, counts = torch.empty(num_experts + 1, dtype=torch.int64), torch.empty(num_experts, dtype=torch.int64)
    _core.dispatch_plan(
        expert_ids,
        expert_ids.shape[1],
        num_experts,
        capacity,
        pad,
        integers(order),
        integers(inverse),
        integers(offsets),
        integers(counts),
        torch.get_num_threads(),
    )
    return order, inverse, offsets, counts


torch.library.impl("moses::dispatch_plan", "cpu")(_plan_cpu)


def _plan_cuda(
    expert_ids: Tensor, num_experts: int, capacity: int | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = expert_ids.numel()
    rows = num_rows(pairs, num_experts, capacity, pad)
    return kernels.plan(expert_ids, num_experts, capacity, pad, rows, index_dtype(pairs, rows))


torch.library.impl("moses::dispatch_plan", "cuda")(kernels.or_reference(_plan_cuda, dispatch_plan_reference))


def _fake(
    expert_ids: Tensor, num_experts: int, capacity: int | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = expert_ids.shape[0] * expert_ids.shape[1]
    rows = num_rows(pairs, num_experts, capacity, pad)
    dtype = index_dtype(pairs, rows)
    return (
        expert_ids.new_empty(rows, dtype=dtype),
        expert_ids.new_empty(pairs, dtype=dtype),
        expert_ids.new_empty(num_experts + 1, dtype=torch.int64),
        expert_ids.new_empty(num_experts, dtype=torch.int64),
    )


torch.library.register_fake("moses::dispatch_plan", _fake)


@overload
def dispatch_plan(
    expert_ids: Tensor, num_experts: int, capacity: int | None = None, *, pad: bool = False
) -> DispatchPlan: ...
@overload
def dispatch_plan(
    expert_ids: np.ndarray[Any, Any], num_experts: int, capacity: int | None = None, *, pad: bool = False
) -> DispatchPlan[np.ndarray[Any, Any]]: ...
def dispatch_plan(
    expert_ids: Tensor | np.ndarray[Any, Any], num_experts: int, capacity: int | None = None, *, pad: bool = False
) -> DispatchPlan[Any]:
    """The plan that sorts routed tokens by expert: stable by expert, then token, then slot.

    Args:
        expert_ids: (T, k) integers in [0, E), any strides: a tensor on any device, or a numpy array. One token may name an expert twice.
        num_experts: E, from k to 2^24.
        capacity: the pairs (token, slot) that an expert takes at most; those after them are dropped. None takes all.
        pad: give every expert exactly `capacity` rows, the last ones empty.

    Returns:
        A `DispatchPlan` of tensors on the same device, or of read-only numpy arrays.

    Raises:
        DispatchError: an id is out of range (`expert_id_range`, with its token and slot; on CUDA an asynchronous assert), or the arguments
            do not fit (`dispatch_arguments`).
    """
    _check(expert_ids, num_experts, capacity, pad)
    arrays: tuple[Any, Any, Any, Any]
    if isinstance(expert_ids, Tensor):
        arrays = torch.ops.moses.dispatch_plan(expert_ids, num_experts, capacity, pad)
    else:
        ids = np.ascontiguousarray(expert_ids, None if expert_ids.dtype in _ARRAY_DTYPES else np.int64)
        if index_dtype(ids.size, num_rows(ids.size, num_experts, capacity, pad)) == torch.int32:
            parts = _planned(ids, num_experts, capacity, pad)
        else:
            parts = torch.ops.moses.dispatch_plan(torch.from_numpy(ids.copy()), num_experts, capacity, pad)
        arrays = tuple(part.numpy() for part in parts)  # type: ignore[assignment]
        for array in arrays:
            array.flags.writeable = False
    num_tokens, top_k = expert_ids.shape
    return DispatchPlan(*arrays, num_tokens, top_k, num_experts, capacity, pad)


def _check(expert_ids: Any, num_experts: int, capacity: int | None, pad: bool) -> None:
    problem = None
    if isinstance(expert_ids, Tensor):
        if expert_ids.dtype not in ID_DTYPES:
            problem = f"expert_ids are {expert_ids.dtype}: give integers"
    elif not isinstance(expert_ids, np.ndarray):
        problem = f"expert_ids are a {type(expert_ids).__name__}: give a torch tensor or a numpy array"
    elif expert_ids.dtype.kind not in "iu":
        problem = f"expert_ids are {expert_ids.dtype}: give integers"
    if problem is not None:
        pass
    elif expert_ids.ndim != 2 or expert_ids.shape[1] < 1:
        problem = f"expert_ids have shape {tuple(expert_ids.shape)}: give (tokens, top_k) with top_k at least 1"
    elif not 1 <= num_experts <= MAX_EXPERTS:
        problem = f"num_experts is {num_experts}: give 1 to {MAX_EXPERTS}"
    elif expert_ids.shape[1] > num_experts:
        problem = (
            f"top_k is {expert_ids.shape[1]} where there are {num_experts} experts: a token can use each only once"
        )
    elif capacity is not None and not 1 <= capacity < 2**31:
        problem = f"capacity is {capacity}: give 1 to 2^31 - 1, or None"
    elif pad and capacity is None:
        problem = "pad=True without a capacity: give the rows that an expert has"
    if problem is not None:
        raise DispatchError(problem, code="dispatch_arguments")
