"""Adding, cutting, joining and taking out experts: one plan, applied to a model in memory or to a checkpoint on disk."""

from __future__ import annotations

from .checkpoint import CheckpointFolder, open_checkpoint
from .compare import Comparison, verify
from .operations import Surgery, Writing, apply, convert, extract, grow, merge, prune
from .plan import LayerSurgery, Slot, SurgeryPlan

__all__ = [
    "CheckpointFolder",
    "Comparison",
    "LayerSurgery",
    "Slot",
    "Surgery",
    "SurgeryPlan",
    "Writing",
    "apply",
    "convert",
    "extract",
    "grow",
    "merge",
    "open_checkpoint",
    "prune",
    "verify",
]
