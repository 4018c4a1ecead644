"""Whether a checkpoint is what surgery makes of its source: every kept tensor, every expert and its gate row. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._core import compare_checkpoints
from ..errors import SurgeryError
from .checkpoint import RECORD, open_checkpoint
from .plan import SurgeryPlan
from .selection import read_json


@dataclass(frozen=True)
class Comparison:
    """What was compared, byte against byte.

    Attributes:
        path: the output.
        against: its source or sources.
        tensors: outside of experts and gates, those that are the source's.
        experts: that are the one of the source that they come from.
        rows: of gates that are that of their expert.
        new: experts that are new or averaged, whose bytes are their own.
        problems: what is not as it must be: (what, how).
    """

    path: str
    against: Sequence[str]
    tensors: int
    experts: int
    rows: int
    new: int
    problems: Sequence[tuple[str, str]] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """One JSON document."""
        return {
            "kind": "surgery",
            "path": self.path,
            "against": list(self.against),
            "ok": self.ok,
            "tensors": self.tensors,
            "experts": self.experts,
            "rows": self.rows,
            "new": self.new,
            "problems": [{"what": what, "problem": problem} for what, problem in self.problems],
        }


def read_record(path: str | Path) -> Mapping[str, Any]:
    """What surgery wrote of itself into an output. Raises `SurgeryError` (`no_record`) where there is none."""
    path = Path(path)
    record = path / RECORD
    if not record.is_file() or record.is_symlink():
        raise SurgeryError(
            f"{path}: it has no {RECORD}, so what was done is not known; give the plan", code="no_record"
        )
    found = read_json(record)
    if not isinstance(found, dict) or not isinstance(found.get("plan"), dict):
        raise SurgeryError(f"{record}: it holds no plan; give the plan", code="no_record")
    return found


def verify(path: str | Path, against: str | Path | Sequence[str | Path], plan: SurgeryPlan | None = None) -> Comparison:
    """Compare an output with its source by its record, or by `plan`.

    Reads both; raises FormatError where either contradicts itself, SurgeryError where the plan is not one for the source.
    """
    sources = [against] if isinstance(against, (str, Path)) else list(against)
    if plan is None:
        plan = SurgeryPlan.from_json(json.dumps(read_record(path)["plan"]))
    opened = [open_checkpoint(source) for source in sources]
    found = compare_checkpoints(open_checkpoint(path).native, [part.native for part in opened], plan.to_json())
    return Comparison(str(path), [str(source) for source in sources], *found)
