"""The settings of a drift detector. Immutable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moses.errors import ConfigError

Test = Literal["page-hinkley", "adwin"]


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """How a change of the distribution is found. Signals are in standard deviations of what is usual in the segment.

    Attributes:
        test: `page-hinkley` (Page 1954) or `adwin` (Bifet and Gavalda 2007), both of the package river.
        reference: sequences at a segment's start that say what is usual; no change is looked for among them.
        slack: what Page-Hinkley takes off every deviation, so that small ones add up to nothing.
        threshold: the sum of deviations of novelty at which Page-Hinkley finds a change.
        loss_threshold: the same of the loss; None leaves the loss out.
        significance: ADWIN's, of a false alarm by its own bound, which is loose: at 1e-4 it missed three of five changes in a trial.
        clip: deviations beyond it count as this many.
        num_features: random features of the ridge that novelty is measured by.
        opening: sequences from a change on by which an earlier task is recognised.
        share: of the opening that must be taken for one earlier task.
        familiar: the most novelty to that task, in the median, in the identifier's standard deviations.
    """

    test: Test = "page-hinkley"
    reference: int = 32
    slack: float = 0.75
    threshold: float = 12.0
    loss_threshold: float | None = 24.0
    significance: float = 0.05
    clip: float = 4.0
    num_features: int = 256
    opening: int = 16
    share: float = 0.5
    familiar: float = 1.0

    def __post_init__(self) -> None:
        if self.test not in get_args(Test):
            raise self._wrong("test", f"one of {', '.join(get_args(Test))}")
        for field, least in (("reference", 8), ("num_features", 2), ("opening", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self._wrong(field, f"a whole number of at least {least}")
        for field, low, high in (
            ("slack", 0.0, math.inf),
            ("threshold", 0.0, math.inf),
            ("loss_threshold", 0.0, math.inf),
            ("significance", 0.0, 1.0),
            ("clip", 0.0, math.inf),
            ("share", 0.0, 1.0),
            ("familiar", 0.0, math.inf),
        ):
            value = getattr(self, field)
            if field == "loss_threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                raise self._wrong(field, f"a number above {low:g} and below {high:g}")

    def _wrong(self, field: str, allowed: str) -> ConfigError:
        return ConfigError(f"drift.{field} is {getattr(self, field)!r}; it must be {allowed}", code="bad_setting")
