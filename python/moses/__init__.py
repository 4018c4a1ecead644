"""moses: continual learning with experts that are added, frozen, shared, pruned and extracted.

    model = moses.attach(model, moses.MosesConfig(num_experts=4, rank=8, top_k=2, density=0.1))
    run = moses.train("smollm2-135m-instruct", stream="demo", method="moses", output_dir="run")
    model = moses.load("run")
    with model.task("topic"): ...

`import moses` is light: torch and transformers are imported when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._core import Mask, Registry
from .errors import MosesError

if TYPE_CHECKING:
    from . import growth, ops, routers, surgery
    from .attachment import attach, detach
    from .checkpoint import load
    from .config import MosesConfig, TrainConfig
    from .growth.extract import extract
    from .growth.live import grow, prune
    from .growth.upcycle import upcycle
    from .moe import MoELayer
    from .plan import DispatchPlan, dispatch_plan
    from .stream import load_stream
    from .training import Run, train

__version__ = "0.1.0"

_LAZY = {
    "DispatchPlan": "plan",
    "MoELayer": "moe",
    "MosesConfig": "config",
    "TrainConfig": "config",
    "attach": "attachment",
    "detach": "attachment",
    "dispatch_plan": "plan",
    "extract": "growth.extract",
    "grow": "growth.live",
    "load": "checkpoint",
    "load_stream": "stream",
    "prune": "growth.live",
    "Run": "training",
    "train": "training",
    "upcycle": "growth.upcycle",
}
_LAZY_MODULES = ("growth", "ops", "routers", "surgery")

__all__ = [
    "DispatchPlan",
    "Mask",
    "MoELayer",
    "MosesConfig",
    "MosesError",
    "Registry",
    "Run",
    "TrainConfig",
    "attach",
    "detach",
    "dispatch_plan",
    "extract",
    "grow",
    "growth",
    "load",
    "load_stream",
    "ops",
    "prune",
    "routers",
    "surgery",
    "train",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'moses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
