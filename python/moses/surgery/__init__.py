"""Adding, cutting, joining and taking out experts: one plan, applied to a model in memory or to a checkpoint on disk.

    done = surgery.prune("mixtral", "mixtral-4", keep=[0, 2, 5, 7])
    assert surgery.verify("mixtral-4", "mixtral").ok

Names are imported when they are first used: a command that reads one header must not wait for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import CheckpointFolder, open_checkpoint
    from .compare import Comparison, verify
    from .operations import Surgery, Writing, apply, convert, extract, grow, merge, prune
    from .plan import LayerSurgery, Slot, SurgeryPlan
    from .upcycling import upcycle

_LAZY = {
    "CheckpointFolder": "checkpoint",
    "Comparison": "compare",
    "LayerSurgery": "plan",
    "Slot": "plan",
    "Surgery": "operations",
    "SurgeryPlan": "plan",
    "Writing": "operations",
    "apply": "operations",
    "convert": "operations",
    "extract": "operations",
    "grow": "operations",
    "merge": "operations",
    "open_checkpoint": "checkpoint",
    "prune": "operations",
    "upcycle": "upcycling",
    "verify": "compare",
}

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
    "upcycle",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moses.surgery' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
