"""What surgery does to the experts of each layer: immutable, printable, saved as JSON, composed, and free of torch.

A layer after surgery is a row of slots, in the order of the gate's rows. A slot says where its expert comes from: kept as it is, copied (with
noise) from one that was there, averaged from several, or fresh. Everything that shrinks, grows, joins or takes out experts is such a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import FormatError, SurgeryError

FORMAT_VERSION = 1
NewRows = Literal["copy", "masked"]


@dataclass(frozen=True)
class Slot:
    """One expert after surgery.

    Attributes:
        sources: slots before surgery that it comes from; none for a fresh expert.
        weights: of the average over `sources`, one each; empty for a single source.
        new: whether it is a further expert (a copy, or fresh) rather than the one that was there.
        noise: standard deviation of the normal noise on a copy, relative to that of each of its tensors.
    """

    sources: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    new: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("sources", int), ("weights", (int, float))):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or any(
                isinstance(v, bool) or not isinstance(v, kind) for v in values
            ):
                raise SurgeryError(f"Slot.{name} is {values!r}; it must be a list of numbers", code="bad_plan")
            object.__setattr__(self, name, tuple(values))
        if any(source < 0 for source in self.sources) or len(set(self.sources)) != len(self.sources):
            raise SurgeryError(f"Slot.sources is {self.sources}; slots are from 0 and named once", code="bad_plan")
        if (len(self.sources) > 1 or self.weights) and len(self.weights) != len(self.sources):
            raise SurgeryError(f"Slot.weights is {self.weights}; give one for each of {self.sources}", code="bad_plan")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise SurgeryError(f"Slot.weights is {self.weights}; they must be finite", code="bad_plan")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < math.inf:
            raise SurgeryError(f"Slot.noise is {self.noise!r}; it must be a number from 0", code="bad_plan")
        if not isinstance(self.new, bool) or not (self.sources or self.new):
            raise SurgeryError("a slot without sources is a fresh expert: say new=True", code="bad_plan")
        if self.noise and not self.new:
            raise SurgeryError("only a new expert has noise: an expert that is kept keeps its bits", code="bad_plan")

    @property
    def kept(self) -> bool:
        """Whether it is one expert of before, bit for bit."""
        return not self.new and len(self.sources) == 1 and self.weights in ((), (1.0,))

    def __str__(self) -> str:
        if self.kept:
            return str(self.sources[0])
        if not self.sources:
            return "fresh"
        weights = self.weights or (1.0,)
        parts = [str(s) if w == 1 else f"{w:.3g}*{s}" for s, w in zip(self.sources, weights, strict=True)]
        return f"{'+' if self.new else ''}({' + '.join(parts)}{f' ~{self.noise:g}' if self.noise else ''})"


@dataclass(frozen=True)
class LayerSurgery:
    """What becomes of one layer's experts.

    Attributes:
        layer: path of the block of the model that has the experts, up to its number: `model.layers.3`. It is the same in every layout.
        before: number of experts before.
        slots: the experts after, in the order of the gate's rows.
        dense: whether the single expert that is left becomes a plain FFN without a gate.
    """

    layer: str
    before: int
    slots: tuple[Slot, ...]
    dense: bool = False

    def __post_init__(self) -> None:
        slots = tuple(slot if isinstance(slot, Slot) else Slot(**slot) for slot in self.slots)
        object.__setattr__(self, "slots", slots)
        if not isinstance(self.layer, str) or not self.layer:
            raise SurgeryError(f"LayerSurgery.layer is {self.layer!r}; it must be a path", code="bad_plan")
        if isinstance(self.before, bool) or not isinstance(self.before, int) or self.before < 1:
            raise SurgeryError(f"{self.layer}: before is {self.before!r}; it must be a number from 1", code="bad_plan")
        if not slots:
            raise SurgeryError(
                f"{self.layer}: no expert would be left; keep at least one of {self.before}", code="no_expert_left"
            )
        wrong = sorted({source for slot in slots for source in slot.sources if source >= self.before})
        if wrong:
            raise SurgeryError(
                f"{self.layer}: has experts 0 to {self.before - 1}, not {wrong[0]}", code="unknown_expert"
            )
        kept = [slot.sources[0] for slot in slots if slot.kept]
        if len(set(kept)) != len(kept):
            raise SurgeryError(f"{self.layer}: an expert is kept twice; make the second one new", code="bad_plan")
        if self.dense and len(slots) != 1:
            raise SurgeryError(f"{self.layer}: {len(slots)} experts cannot become one FFN", code="bad_plan")

    @property
    def unchanged(self) -> bool:
        """Whether every expert stays, in its place."""
        return not self.dense and [str(slot) for slot in self.slots] == [str(index) for index in range(self.before)]


@dataclass(frozen=True)
class SurgeryPlan:
    """Surgery on a whole model.

    Attributes:
        layers: the layers with experts, each once; a layer that is not named stays as it is.
        top_k: experts a token after surgery; None leaves it.
        new_rows: gate rows of new experts: `copy` of their source's (fresh experts draw theirs), or `masked`, never chosen until they are
            trained: a selection bias of -1e4 where the gate has one, refused where it has none.
        seed: of noise and fresh experts.
    """

    layers: tuple[LayerSurgery, ...]
    top_k: int | None = None
    new_rows: NewRows = "copy"
    seed: int = 0

    def __post_init__(self) -> None:
        layers = tuple(part if isinstance(part, LayerSurgery) else LayerSurgery(**part) for part in self.layers)
        object.__setattr__(self, "layers", layers)
        names = [part.layer for part in layers]
        if len(set(names)) != len(names):
            raise SurgeryError("a layer is named twice in one plan; join its surgery by then()", code="bad_plan")
        for name, least in (("seed", 0), ("top_k", 1)):
            value = getattr(self, name)
            if name == "top_k" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SurgeryError(f"SurgeryPlan.{name} is {value!r}; it must be from {least}", code="bad_plan")
        if self.new_rows not in ("copy", "masked"):
            raise SurgeryError(f"SurgeryPlan.new_rows is {self.new_rows!r}; it is copy or masked", code="bad_plan")
        if self.top_k is not None:
            self.require_top_k(self.top_k)

    def require_top_k(self, top_k: int) -> None:
        """Check that every layer with a gate has `top_k` experts after surgery. Raises `SurgeryError` (`top_k_too_large`)."""
        for part in self.layers:
            if not part.dense and len(part.slots) < top_k:
                raise SurgeryError(
                    f"{part.layer}: {len(part.slots)} experts would be left and a token uses {top_k}; keep more, or lower top-k",
                    code="top_k_too_large",
                )

    def __getitem__(self, layer: str) -> LayerSurgery:
        """The surgery of a layer; KeyError where the plan leaves it alone."""
        return {part.layer: part for part in self.layers}[layer]

    def __str__(self) -> str:
        lines = []
        for part in self.layers:
            after = "dense" if part.dense else str(len(part.slots))
            lines.append(f"{part.layer}  {part.before} -> {after}: {' '.join(map(str, part.slots))}")
        if self.top_k is not None:
            lines.append(f"top_k -> {self.top_k}")
        return "\n".join(lines)

    def then(self, later: SurgeryPlan) -> SurgeryPlan:
        """One plan that does this one and then `later`, whose slots are those after this one.

        Raises:
            SurgeryError: the plans do not fit each other, or noise would have to be drawn twice from different seeds (`plans_differ`).
        """
        if self.seed != later.seed and any(s.new and s.noise for p in (*self.layers, *later.layers) for s in p.slots):
            raise SurgeryError(
                "plans with noise of different seeds cannot be one; apply them in turn", code="plans_differ"
            )
        mine, theirs = ({part.layer: part for part in plan.layers} for plan in (self, later))
        joined = []
        for layer in dict.fromkeys([*mine, *theirs]):
            first, second = mine.get(layer), theirs.get(layer)
            if first is None or second is None:
                joined.append(first or theirs[layer])
            elif first.dense or len(first.slots) != second.before:
                raise SurgeryError(
                    f"{layer}: the first plan leaves {'a dense FFN' if first.dense else len(first.slots)} and the second starts from {second.before}",
                    code="plans_differ",
                )
            else:
                slots = tuple(_through(first.slots, slot, layer) for slot in second.slots)
                joined.append(LayerSurgery(layer, first.before, slots, second.dense))
        top_k = self.top_k if later.top_k is None else later.top_k
        new_rows: NewRows = "masked" if "masked" in (self.new_rows, later.new_rows) else "copy"
        return SurgeryPlan(tuple(joined), top_k, new_rows, max(self.seed, later.seed))

    def to_json(self) -> str:
        """JSON with a format version; the same plan gives the same bytes."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> SurgeryPlan:
        """Read what `to_json` wrote. Raises `FormatError` for anything else."""
        try:
            fields = json.loads(text)
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise FormatError(
                    f"the plan's format_version is {version!r}, this moses reads {FORMAT_VERSION}",
                    code="unknown_version",
                )
            return SurgeryPlan(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"not a surgery plan: {error}", code="bad_plan") from None


def keep(before: Mapping[str, int], kept: Mapping[str, Sequence[int]], top_k: int | None = None) -> SurgeryPlan:
    """The plan that leaves, of each layer's `before` experts, those in `kept`, in that order."""
    layers = (LayerSurgery(name, before[name], tuple(Slot((e,)) for e in experts)) for name, experts in kept.items())
    return SurgeryPlan(tuple(layers), top_k)


def _through(slots: tuple[Slot, ...], slot: Slot, layer: str) -> Slot:
    """`slot`, whose sources are `slots`, by the sources of those."""
    parts = [slots[source] for source in slot.sources]
    if not parts or slot.kept:
        return parts[0] if parts else slot
    if (any(part.noise for part in parts) and (slot.noise or len(parts) > 1)) or any(
        not part.sources for part in parts
    ):
        raise SurgeryError(
            f"{layer}: a slot is made from a noisy or fresh expert; apply the plans in turn", code="plans_differ"
        )
    total: dict[int, float] = {}
    for part, weight in zip(parts, slot.weights or (1.0,), strict=True):
        for source, share in zip(part.sources, part.weights or (1.0,), strict=True):
            total[source] = total.get(source, 0.0) + weight * share
    weights = () if len(total) == 1 and set(total.values()) == {1.0} else tuple(total.values())
    return Slot(
        tuple(total), weights, slot.new or any(part.new for part in parts), max([slot.noise, *(p.noise for p in parts)])
    )
