"""A checkpoint folder as surgery sees it: opened and checked by the Rust core from headers alone. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core import Checkpoint as NativeCheckpoint
from ..errors import SurgeryError

if TYPE_CHECKING:
    from .selection import Facts

RECORD = "moses_surgery.json"
"""What surgery writes of itself into its output: the plan and, where asked for, hashes."""

MANIFEST = "manifest.json"

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3", "gpt_oss")
"""The model types of the core's table of layouts."""


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint that was opened: `native` holds its headers, `document` is what `moses inspect` shows."""

    path: Path
    native: NativeCheckpoint

    @cached_property
    def document(self) -> dict[str, Any]:
        """Model type, layers with experts, shards, dtypes, bytes."""
        found: dict[str, Any] = json.loads(self.native.describe())
        return found

    @cached_property
    def facts(self) -> Facts:
        """What a plan needs. Raises `SurgeryError` where there are no experts that surgery knows."""
        from .selection import Facts

        document = self.document
        if not document["layers"]:
            known = "it has no layer with experts" if document["known"] else "surgery does not know this model type"
            raise SurgeryError(
                f"{self.path}: {known} ({document['model_type'] or 'no model_type'}); give a mixture-of-experts checkpoint",
                code="no_experts",
            )
        counts = {layer["layer"]: layer["experts"] for layer in document["layers"]}
        return Facts(str(self.path), counts, document["top_k"], document["groups"], document["selection_bias"])


def open_checkpoint(path: str | Path) -> CheckpointFolder:
    """Open a checkpoint folder, reading headers alone.

    Raises:
        FormatError: it contradicts itself, or leads out of its folder.
        SurgeryError: it is a run of moses (`is_a_run`).
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        raise SurgeryError(
            f"{path}: this is a run of moses, not a checkpoint; use the live model's own growth and pruning",
            code="is_a_run",
        )
    return CheckpointFolder(path, NativeCheckpoint.open(path))
