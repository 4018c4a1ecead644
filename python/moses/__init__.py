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
    from .attachment import attach, detach
    from .checkpoint import load
    from .config import MosesConfig, TrainConfig
    from .stream import load_stream
    from .training import Run, train

__version__ = "0.1.0"

_LAZY = {
    "MosesConfig": "config",
    "TrainConfig": "config",
    "attach": "attachment",
    "detach": "attachment",
    "load": "checkpoint",
    "load_stream": "stream",
    "Run": "training",
    "train": "training",
}

__all__ = [
    "Mask",
    "MosesConfig",
    "MosesError",
    "Registry",
    "Run",
    "TrainConfig",
    "attach",
    "detach",
    "load",
    "load_stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
