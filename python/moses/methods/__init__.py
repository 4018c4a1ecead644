"""Methods of continual learning: what to add before a task, what to train, what to freeze after it. One file each."""

from __future__ import annotations

from ..errors import ConfigError
from .base import Method
from .finetune import FinetuneMethod, JointMethod
from .lifelong_moe import LifelongMoEMethod
from .moses import MosesMethod
from .pangu_sigma import PanguSigmaMethod
from .per_task import PerTaskMethod
from .sequential import SequentialMethod

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        MosesMethod,
        SequentialMethod,
        PerTaskMethod,
        FinetuneMethod,
        JointMethod,
        LifelongMoEMethod,
        PanguSigmaMethod,
    )
}


def method_class(name: str) -> type[Method]:
    """The method of that name; `ConfigError` lists the known ones."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}; known methods are {', '.join(sorted(METHODS))}", code="unknown_method"
        )
    return METHODS[name]


__all__ = ["METHODS", "Method", "method_class"]
