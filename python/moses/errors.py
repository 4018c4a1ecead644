"""Every error of moses, in one tree.

A message is one line: what happened, where (path, field, value), how to mend it. `code` is stable snake_case, made for
programs; the text may change. Errors of the operating system stay Python's own (`FileNotFoundError`,
`PermissionError`). This module imports nothing, so that catching an error costs nothing.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DispatchError",
    "FormatError",
    "KernelError",
    "ModelError",
    "MosesError",
    "RegistryError",
    "RunError",
    "StoreError",
    "StreamError",
    "SurgeryError",
]


class MosesError(Exception):
    """The base of every error that moses raises on purpose.

    `code` is the stable name of the kind of error; without one it is the class's own.
    """

    code: str = "moses"

    def __init__(self, message: str = "", code: str | None = None) -> None:
        super().__init__(" ".join(str(message).split()))
        if code is not None:
            self.code = code


class ConfigError(MosesError):
    """A setting is unknown, of the wrong type, or out of range."""

    code = "config"


class StreamError(MosesError):
    """The stream of tasks is missing or has a bad row."""

    code = "stream"


class ModelError(MosesError):
    """The model does not fit: its architecture, its fingerprint, its context."""

    code = "model"


class DispatchError(MosesError):
    """Routes, a plan and rows do not fit each other, or an id is out of range."""

    code = "dispatch"


class KernelError(MosesError):
    """A CUDA kernel cannot be compiled, loaded or started."""

    code = "kernel"


class RegistryError(MosesError):
    """The ledger of layers, tasks and masks was asked for what it does not have or must not do."""

    code = "registry"


class StoreError(MosesError):
    """A run folder is locked, not there, read-only, or lacks a file."""

    code = "store"


class FormatError(MosesError):
    """Bytes are damaged, hostile, or of another version."""

    code = "format"


class RunError(MosesError):
    """A run cannot go on as it is asked to."""

    code = "run"


class SurgeryError(MosesError):
    """Experts cannot be added, cut, joined or taken out as it is asked for."""

    code = "surgery"
