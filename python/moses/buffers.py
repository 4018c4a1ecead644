"""Memory for the CPU's kernels: tensors over memory that is used again, and tensors as the buffers that the core reads.

A fresh page costs the kernel some four times what copying it costs, so large results come from a pool in the core: a result's
memory goes back when nothing refers to the tensor's storage any more, and never before. The pool keeps at most 1 GiB of free
memory (`_core.pool_bytes` says how much, `_core.pool_clear` gives it back to the system); what is in use does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core

SMALL = 1 << 16  # bytes below which the allocator is as good

_AS_BYTES = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of any content, as `torch.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_core.Block(size), dtype=dtype).view(shape)


def buffer(tensor: Tensor) -> Any:
    """A contiguous CPU tensor's memory as a numpy array; 16-bit floats as integers, which numpy has."""
    tensor = tensor.detach()
    dtype = _AS_BYTES.get(tensor.dtype)
    return (tensor if dtype is None else tensor.view(dtype)).numpy()


def integers(tensor: Tensor) -> Any:
    """As `buffer`, of integers, which have no gradient to leave behind: half the time, which small plans are made of."""
    return tensor.numpy()
