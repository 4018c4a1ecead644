"""Evaluating a run whose tasks were opened by a drift detector: its segments answer for the stream's domains.

A domain's parameters are those of the segment that most of its sequences went to. Only the scoring knows which that is; with
the task inferred, a prompt is answered by whatever segment the identifier takes it for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from . import _core
from .answers import TaskFormat
from .config import TrainConfig
from .errors import ConfigError
from .methods import Method


class SegmentRegistry:
    """A registry that answers to the names of domains, too."""

    def __init__(self, registry: _core.Registry, segments: Mapping[str, str]) -> None:
        self._registry, self._segments = registry, segments

    def task(self, name: str) -> _core.TaskInfo:
        """The live task of this name, or the segment of this domain."""
        return self._registry.task(self._segments.get(name, name))

    def tasks(self) -> list[_core.TaskInfo]:
        """The live tasks, by id."""
        return self._registry.tasks()


class SegmentMethod:
    """As much of a method as its evaluation needs.

    `segments`: the segment of each domain that has one.
    """

    def __init__(self, method: Method, segments: Mapping[str, str]) -> None:
        self._method, self._segments = method, segments
        self.registry = SegmentRegistry(method.registry, segments)

    @property
    def model(self) -> Any:
        """The method's model, which PEFT wraps at its first task."""
        return self._method.model

    def answer(self, name: str | None) -> AbstractContextManager[object]:
        """Answer with the parameters of a segment, of a domain's segment, or as the base model."""
        return self._method.answer(None if name is None else self._segments.get(name, name))


def segment_formats(formats: Mapping[str, TaskFormat], registry: _core.Registry) -> dict[str, TaskFormat]:
    """The formats of the domains, and for every segment the longest of them, for it may answer for any domain."""
    longest = TaskFormat(max(form.max_new_tokens for form in formats.values()), ())
    return {**{info.name: longest for info in registry.tasks()}, **formats}


def check_online(method: type[Method], config: TrainConfig, kind: str) -> None:
    """Raise a `ConfigError` where this method or a model of this kind cannot learn without boundaries, or not with these settings."""
    if kind == "classifier":
        raise ConfigError(
            "a classifier's head needs its task's labels, which a stream without boundaries does not give; "
            "give a language model, or --boundaries given",
            code="boundaries_needed",
        )
    if method.trains_on is not Method.trains_on:
        raise ConfigError(
            f"method {method.name!r} needs the stream's tasks at once; give another --method, or --boundaries given",
            code="boundaries_needed",
        )
    for field, allowed in (("precision", ("float32", "bfloat16")), ("gradient_accumulation", (1,))):
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"{field} is {getattr(config, field)!r}; without boundaries it must be {' or '.join(map(str, allowed))}",
                code="bad_setting",
            )
