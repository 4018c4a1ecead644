"""Several processes of one run, as `torchrun` starts them: all train and evaluate alike, and the first alone writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def join() -> torch.device:
    """Join the other processes of the run, if there are any; the device that this one computes on."""
    import torch
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=not torch.accelerator.is_available()).device
    return device


def is_writer() -> bool:
    """Whether this process writes the run folder."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    """Wait for the other processes of the run."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
