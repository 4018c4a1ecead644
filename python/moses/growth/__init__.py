"""Growing language models: dense to mixture of experts and back, and the folders that hold what no class of transformers does.

ffns      the dense FFNs of a model, and what they compute
blocks    the mixtures of a model, whatever their class calls them
classes   which class of transformers holds what; configs carried field by field
upcycle   dense to mixture, computing the same
extract   a sub-model of the experts that are kept
layer     moses's own mixture in a model of transformers
layout    what a config does not say, as JSON
folder    writing and reading
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import MoEBlock, moe_blocks
    from .ffns import DenseFFN, dense_ffns
    from .folder import load_folder, save_model
    from .layer import MixtureFFN, route

_LAZY = {
    "DenseFFN": "ffns",
    "MixtureFFN": "layer",
    "MoEBlock": "blocks",
    "dense_ffns": "ffns",
    "load_folder": "folder",
    "moe_blocks": "blocks",
    "route": "layer",
    "save_model": "folder",
}

__all__ = [
    "DenseFFN",
    "MixtureFFN",
    "MoEBlock",
    "dense_ffns",
    "load_folder",
    "moe_blocks",
    "route",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moses.growth' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
