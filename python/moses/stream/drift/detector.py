"""Finds the end of a segment: a sequential test of river on each signal, one sequence after the other.

A segment's first sequences are its reference. What is usual is learned again whenever the segment has doubled, without the
latest sequences, for they may be another domain's already; so a domain that wanders a little is not taken for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import DriftConfig
from .signals import Novelty, Surprise, Vector

MAX_REFERENCE = 512  # sequences: more say nothing new, and cost time at each doubling
DAMPED = 1.0  # Page-Hinkley's forgetting factor: none, for a segment ends it anyway


class _Test(Protocol):
    @property
    def drift_detected(self) -> bool: ...

    def update(self, x: float) -> None: ...


class DriftDetector:
    """Watches one segment; make a new one for the next.

    Attributes:
        config: the settings.
        change: where in the segment, from 0, what was found began; None while nothing is found.
        signal: which signal found it, `novelty` or `loss`.
    """

    def __init__(self, config: DriftConfig) -> None:
        self.config = config
        self.change: int | None = None
        self.signal: str | None = None
        self._features: list[NDArray[Any]] = []
        self._losses: list[float] = []
        self._start = 0  # of what is tested: the reference's length
        self._channels: dict[str, _Channel] = {}

    def __len__(self) -> int:
        return len(self._features)

    def update(self, features: NDArray[Any], loss: float | None = None) -> bool:
        """Take the next sequence, features (2, D) and its loss in nats a token; whether a change is found.

        Give a loss for every sequence of the segment or for none.
        """
        self._features.append(np.asarray(features, np.float64))
        if loss is not None:
            self._losses.append(loss)
        count = len(self)
        if count == self.config.reference:
            self._learn(count)
        elif self._start and count == 2 * self._start + self.config.opening and 2 * self._start <= MAX_REFERENCE:
            self._learn(2 * self._start)
        elif self._start:
            self._test(count - 1, count)
        return self.change is not None

    def dismiss(self) -> None:
        """What was found is no change: learn from the whole segment what is usual, and go on."""
        self.change = self.signal = None
        self._learn(len(self))

    def _learn(self, reference: int) -> None:
        config = self.config
        self._start = reference
        novelty = Novelty(np.stack(self._features[:reference][-MAX_REFERENCE:]), config.num_features)
        self._channels = {"novelty": _Channel(config, config.threshold, novelty, novelty.reference)}
        if self._losses and config.loss_threshold is not None:
            surprise = Surprise(self._losses[:reference][-MAX_REFERENCE:])
            self._channels["loss"] = _Channel(config, config.loss_threshold, surprise, surprise.reference)
        self._test(reference, len(self))

    def _test(self, start: int, stop: int) -> None:
        if start == stop:
            return
        rows: dict[str, Any] = {
            "novelty": np.stack(self._features[start:stop]),
            "loss": self._losses[start:stop],
        }
        for name, channel in self._channels.items():
            found = channel.update(rows[name])
            if found is not None and self.change is None:
                self.change, self.signal = self._start + found, name


class _Channel:
    """One signal under its test."""

    def __init__(self, config: DriftConfig, threshold: float, measure: Novelty | Surprise, reference: Vector) -> None:
        self.config, self.measure = config, measure
        self.values: list[float] = []
        self.test = _make_test(config, threshold, len(reference))
        for value in np.clip(reference, -config.clip, config.clip).tolist():
            self._step(value)

    def update(self, rows: Any) -> int | None:
        """Where, among all values so far, a change began, once one is found."""
        config = self.config
        for value in np.clip(self.measure(rows), -config.clip, config.clip).tolist():
            self.values.append(value)
            if self._step(value):
                return _began(self.values)
        return None

    def _step(self, value: float) -> bool:
        clip = self.config.clip
        self.test.update((value + clip) / (2 * clip) if self.config.test == "adwin" else value)
        return self.test.drift_detected


def _make_test(config: DriftConfig, threshold: float, reference: int) -> _Test:
    from river import drift  # takes seconds

    if config.test == "adwin":
        adwin: Any = drift.ADWIN
        found: _Test = adwin(delta=config.significance, clock=1, grace_period=reference + 1)
        return found
    return drift.PageHinkley(
        min_instances=reference + 1, delta=config.slack, threshold=threshold, alpha=DAMPED, mode="up"
    )


def _began(values: Sequence[float]) -> int:
    """The most likely start of a change to a higher mean, what was usual having mean 0 and variance 1: of all tails the one whose sum,
    squared, is largest for its length. Where Page's sum began to rise is too early: what comes next would begin with the old domain.
    """
    tails = np.cumsum(np.asarray(values[::-1], np.float64))
    gain = np.maximum(tails, 0.0) ** 2 / np.arange(1, len(tails) + 1)
    return len(values) - 1 - int(gain.argmax())
