"""Whether a checkpoint is what surgery makes of its source: every kept tensor, every expert and its gate row. Free of torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._core import blake3_hex, compare_checkpoints
from ..errors import SurgeryError
from ..tensorfile import TensorFile
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


def changed_since_hashed(path: str | Path) -> list[tuple[str, str]]:
    """Tensors that are not what their recorded hash says, and how; none where no hashes were recorded (`--hash`).

    Raises FormatError where a shard is damaged, SurgeryError where the record is.
    """
    path = Path(path)
    if not (path / RECORD).is_file():
        return []
    hashes = read_record(path).get("blake3", {})
    if not isinstance(hashes, dict):
        raise SurgeryError(f"{path / RECORD}: its blake3 is no object; write the checkpoint again", code="no_record")
    left = dict(hashes)
    for shard in sorted(path.glob("*.safetensors")):
        file = TensorFile.open(shard)
        if not any(name in hashes for name in file.tensors):
            continue
        with shard.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            start = 8 + int.from_bytes(mapped[:8], "little")
            with memoryview(mapped) as view:
                for name, info in file.tensors.items():
                    with view[start + info.begin : start + info.end] as content:
                        if name in left and blake3_hex(content) == left[name]:
                            del left[name]
    return [(name, "its bytes are not those that were recorded") for name in sorted(left)]


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
