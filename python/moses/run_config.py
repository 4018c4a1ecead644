"""config.json of a run: what it was made from and how, enough to go on with it or to load it in another process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .errors import FormatError, RunError
from .run_files import CONFIG, FORMAT_VERSION


@dataclass(frozen=True)
class ModelSource:
    """The base model: where it was loaded from (None for one that was given in memory), its kind and what it must hash to."""

    source: str | None
    kind: str
    model_type: str
    dtype: str
    fingerprint: str


@dataclass(frozen=True)
class StreamSource:
    """The stream: where it was read from, its tasks in order with their metrics, and a hash of every example."""

    source: str | None
    name: str
    tasks: tuple[str, ...]
    metrics: dict[str, str]
    digest: str


@dataclass(frozen=True)
class RunConfig:
    """All that a run was started with.

    Attributes:
        method: name of the method.
        method_config, train_config, identifier_config: the settings, as JSON objects.
        model: the base model.
        stream: the stream; None for a model that was saved without one.
        formats: how each task's answers are read off: {"max_new_tokens", "labels"} by the task's name.
        online: settings of a run without task boundaries; None where they are given.
        budget: bytes that all tasks together may add; None is no limit.
    """

    method: str
    method_config: dict[str, Any]
    train_config: dict[str, Any]
    identifier_config: dict[str, Any]
    model: ModelSource
    stream: StreamSource | None
    formats: dict[str, dict[str, Any]]
    online: dict[str, Any] | None = None
    budget: int | None = None

    def to_bytes(self) -> bytes:
        """JSON with a format version."""
        fields = asdict(self)
        for name in ("online", "budget"):
            if fields[name] is None:
                del fields[name]
        return (json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> RunConfig:
        """Read what `to_bytes` wrote. Raises `FormatError` for anything else."""
        try:
            fields = json.loads(data)
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise FormatError(
                    f"{CONFIG}: format_version is {version!r}, this moses reads {FORMAT_VERSION}",
                    code="unknown_version",
                )
            # runs from before there was a choice
            if fields["method"] in ("moses", "sequential", "per-task"):
                fields["method_config"].setdefault("head_norm", False)
            if fields["method"] == "moses":
                fields["method_config"].setdefault("weight_dtype", "float32")
                fields["method_config"].setdefault("ffn_experts", None)
            stream = fields["stream"]
            if stream is not None:
                stream = StreamSource(**{**stream, "tasks": tuple(stream["tasks"])})
            return RunConfig(**{**fields, "model": ModelSource(**fields["model"]), "stream": stream})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{CONFIG}: not a run's config: {error}; restore it from a backup", code="bad_config"
            ) from None

    def require_same(self, other: RunConfig) -> None:
        """Check that a run may go on with `other`'s settings.

        Raises:
            RunError: a field differs; the message names the first one.
        """
        parts = ("method", "method_config", "identifier_config", "model", "stream", "formats", "train_config")
        for field in (*parts, "online", "budget"):
            mine, theirs = _plain(getattr(self, field)), _plain(getattr(other, field))
            if mine != theirs:
                where = _first_difference(field, mine, theirs)
                raise RunError(
                    f"the run was started with another {where}; give the same, or another --out", code="run_differs"
                )


def _plain(value: Any) -> Any:
    # Where a model or a stream lies may change between two sittings; what it is may not.
    return asdict(value) | {"source": None} if hasattr(value, "__dataclass_fields__") else value


def _first_difference(path: str, mine: Any, theirs: Any) -> str:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys(), key=str):
            if mine.get(key) != theirs.get(key):
                return _first_difference(f"{path}.{key}", mine.get(key), theirs.get(key))
    return f"{path} (run: {mine!r:.60}, now: {theirs!r:.60})"
