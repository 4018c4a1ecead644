"""Adding, cutting, joining and taking out experts: one plan, applied to a model in memory or to a checkpoint on disk."""

from __future__ import annotations

from .plan import LayerSurgery, Slot, SurgeryPlan

__all__ = ["LayerSurgery", "Slot", "SurgeryPlan"]
