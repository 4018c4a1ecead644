"""The face of a model with growing layers: choose the task to answer for. Mixed into the model's own class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import nn

from .. import _core


class Answering(Protocol):
    """What a method of growing experts does for its model."""

    registry: _core.Registry

    def answer(self, name: str | None) -> AbstractContextManager[object]:
        """As `Method.answer`."""


class GrownModel(nn.Module):
    """A model whose tasks have experts in growing layers."""

    # transformers evaluates the annotations of its model classes, so these must be importable at run time.
    _answering: Any  # Answering

    @property
    def registry(self) -> _core.Registry:
        """The ledger of layers, experts and tasks."""
        registry: _core.Registry = self._answering.registry
        return registry

    @contextmanager
    def task(self, name: str) -> Iterator[GrownModel]:
        """Answer for task `name` inside the with block. Raises `RegistryError` for a task that is not there."""
        with self._answering.answer(name):
            yield self

    @contextmanager
    def base(self) -> Iterator[GrownModel]:
        """Answer as the model did before any task, inside the with block."""
        with self._answering.answer(None):
            yield self


def mix_in(model: nn.Module, answering: Answering) -> None:
    """Give `model` the face of `GrownModel`, in place."""
    base = type(model)
    # the same name, for transformers looks model classes up by it
    model.__class__ = type(
        base.__name__, (GrownModel, base), {"__module__": base.__module__, "__qualname__": base.__qualname__}
    )
    model.__dict__["_answering"] = answering
