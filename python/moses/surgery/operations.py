"""Surgery on checkpoint folders: prune, grow, extract, merge, convert, and any plan. Free of torch.

Everything is planned and checked from headers; then bytes are moved by the Rust core. The output appears whole or not at
all. With `dry_run` nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._core import SurgeryJob
from ..errors import SurgeryError
from . import selection
from .checkpoint import CheckpointFolder, open_checkpoint
from .plan import SurgeryPlan
from .selection import Choice, NewRowsChoice

PathLike = str | Path
Progress = Callable[[int, int], object]
"""Told the bytes done and to do, some times a second; what it raises stops the work, and nothing is left behind."""

LayoutName = Literal["fused", "per-expert"]


@dataclass(frozen=True)
class Writing:
    """How the output is written.

    Attributes:
        in_place: change the checkpoint's own folder, writing only what is new.
        link: link shards that do not change instead of copying them.
        hash: record BLAKE3 hashes of what was kept, taken in the same pass.
        uneven: allow layers with different numbers of experts, which transformers cannot load.
        dry_run: plan only.
        progress: told of bytes done.
    """

    in_place: bool = False
    link: bool = False
    hash: bool = False
    uneven: bool = False
    dry_run: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Surgery:
    """What was done, or with `dry_run` would be.

    Attributes:
        operation: prune, grow, extract, merge, convert, apply.
        plan: what becomes of each layer's experts.
        path: the output; None after a dry run.
        description: tensors by fate, shards, files, bytes read and written, notes.
    """

    operation: str
    plan: SurgeryPlan
    path: Path | None
    description: Mapping[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """One JSON document."""
        return {
            "operation": self.operation,
            "path": None if self.path is None else str(self.path),
            "plan": json.loads(self.plan.to_json()),
            **self.description,
        }


def apply(
    checkpoints: PathLike | Sequence[PathLike],
    plan: SurgeryPlan,
    out: PathLike | None = None,
    *,
    layout: LayoutName | None = None,
    operation: str = "apply",
    writing: Writing | None = None,
) -> Surgery:
    """Apply a plan to a checkpoint; of several, experts of the second count on from the first's.

    Raises:
        FormatError: a checkpoint contradicts itself.
        SurgeryError: the plan does not fit, the result would not load, or the output cannot be there.
    """
    paths = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    return _do(operation, [open_checkpoint(path) for path in paths], plan, out, layout, writing or Writing())


def prune(
    checkpoint: PathLike,
    out: PathLike | None = None,
    *,
    keep: Choice | None = None,
    usage: Mapping[str, Sequence[float]] | str | None = None,
    to: int | None = None,
    top_k: int | None = None,
    writing: Writing | None = None,
) -> Surgery:
    """Leave fewer experts: those in `keep`, or the `to` of each layer that `usage` says most of.

    `usage` is a number for each expert by layer, or `magnitude`, the norm of an expert's weights, which needs no data.
    Raises as `apply`.
    """
    opened = open_checkpoint(checkpoint)
    if (keep is None) == (usage is None) or (usage is None) != (to is None):
        raise SurgeryError("prune: give keep, or usage and to", code="bad_choice")
    if usage is not None and to is not None:
        scores = dict(opened.native.expert_norms()) if usage == "magnitude" else usage
        if not isinstance(scores, Mapping):
            raise SurgeryError(f"usage is {usage!r}; give numbers by layer, or 'magnitude'", code="bad_usage")
        keep = selection.most_used(opened.facts, scores, to)
    plan = selection.keep(opened.facts, keep if keep is not None else [], top_k)
    return _do("prune", [opened], plan, out, None, writing or Writing())


def grow(
    checkpoint: PathLike,
    out: PathLike | None = None,
    *,
    add: int,
    sources: Choice | None = None,
    noise: float = 0.0,
    seed: int = 0,
    new_rows: NewRowsChoice = "auto",
    top_k: int | None = None,
    writing: Writing | None = None,
) -> Surgery:
    """Add `add` experts to every layer, copies of `sources` in turn with noise relative to each matrix's deviation.

    The model's outputs stay bit for bit where every gate has a selection bias (deepseek_v3, gpt_oss) and `new_rows` is `auto`
    or `masked`; the notes of the result say which. Raises as `apply`.
    """
    opened = open_checkpoint(checkpoint)
    plan = selection.grown(opened.facts, add, sources, noise=noise, seed=seed, new_rows=new_rows, top_k=top_k)
    return _do("grow", [opened], plan, out, None, writing or Writing())


def extract(
    checkpoint: PathLike,
    out: PathLike | None = None,
    *,
    experts: Choice,
    dense: bool | None = None,
    top_k: int | None = None,
    writing: Writing | None = None,
) -> Surgery:
    """Take a domain's experts out: a smaller mixture, or a dense model when one expert is left of every layer.

    `dense` None decides by whether the type has a dense one that computes the same.
    Raises as `apply`.
    """
    opened = open_checkpoint(checkpoint)
    chosen = selection.by_layer(opened.facts, experts, "experts")
    if dense is None:
        single = all(len(numbers) == 1 for numbers in chosen.values())
        dense = single and opened.document["dense_type"] is not None
    plan = selection.extracted(opened.facts, experts, dense=dense, top_k=top_k)
    return _do("extract", [opened], plan, out, None, writing or Writing())


def merge(
    checkpoints: Sequence[PathLike],
    out: PathLike | None = None,
    *,
    top_k: int | None = None,
    writing: Writing | None = None,
) -> Surgery:
    """Put the experts of the later checkpoints beside the first's and join the gates' rows; all else is the first's.

    Raises as `apply`.
    """
    if len(checkpoints) < 2:
        raise SurgeryError("merge: give two checkpoints or more", code="bad_choice")
    opened = [open_checkpoint(path) for path in checkpoints]
    plan = selection.merged([part.facts for part in opened], top_k)
    return _do("merge", opened, plan, out, None, writing or Writing())


def convert(
    checkpoint: PathLike, out: PathLike | None = None, *, layout: LayoutName, writing: Writing | None = None
) -> Surgery:
    """Write the same model with its experts in one tensor each (`per-expert`) or in one for all (`fused`). Raises as `apply`."""
    opened = open_checkpoint(checkpoint)
    opened.facts  # noqa: B018  (raises where there are no experts)
    return _do("convert", [opened], SurgeryPlan(()), out, layout, writing or Writing())


def require_place(out: PathLike | None, writing: Writing) -> None:
    """Raise `SurgeryError` (`bad_choice`) unless there is one place for the output, or none is needed."""
    if writing.in_place and out is not None:
        raise SurgeryError("give an output folder, or in_place, not both", code="bad_choice")
    if out is None and not writing.in_place and not writing.dry_run:
        raise SurgeryError("give an output folder, or in_place, or dry_run", code="bad_choice")


def _do(
    operation: str,
    opened: Sequence[CheckpointFolder],
    plan: SurgeryPlan,
    out: PathLike | None,
    layout: LayoutName | None,
    writing: Writing,
) -> Surgery:
    require_place(out, writing)
    job = SurgeryJob.plan(
        [part.native for part in opened], plan.to_json(), operation, layout, writing.uneven, writing.in_place
    )
    description: dict[str, Any] = json.loads(job.describe(writing.link))
    if writing.dry_run:
        return Surgery(operation, plan, None, description)
    path, _ = job.run(out if out is not None else opened[0].path, writing.link, writing.hash, writing.progress)
    return Surgery(operation, plan, Path(path), description)
