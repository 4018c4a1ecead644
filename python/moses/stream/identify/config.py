"""The settings of a task identifier, and what it answers with. Immutable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moses.errors import ConfigError

Kind = Literal["ridge", "cosine", "prompt_loss"]

MAX_TASK_BYTES = 500_000
"""The most that one task may keep on disk, everything that its removal needs included."""

NUM_VECTORS = 2
"""A prompt's features are this many vectors: the mean of its embeddings, and that of a layer's activations."""

# 2 bytes for each pair of features and 16 for each feature are 494,856 bytes; the rest is for headers
MAX_FEATURES = 696


@dataclass(frozen=True)
class IdentifierConfig:
    """How tasks are told apart.

    `kind`: "ridge" (analytic ridge regression, the default), "cosine" (mean key of a task) or "prompt_loss" (the caller
    gives losses). `num_features`: random features of the ridge, the constant one included. `layer`: how many blocks of
    the trunk are run for the features, None for half of them. `ridge`: strength of the ridge, shared by the rows of a
    task, beside features of about unit size. `threshold`: a prompt is unknown when it lies more than `threshold` ·
    certainty standard deviations outside what the task's own prompts showed; `inf` never says unknown. `seed`: draws
    the random features, 0 to 2**32 - 1. Raises ConfigError for a value out of its range.

    The defaults were chosen on stream8 (8 tasks, MiniLM, fitted on 500 prompts a task, each whole and without its
    template) by five-fold validation on the train and eval parts: % right of prompts without their template; in
    brackets, tweets that mention a user weigh as much as those that do not (93% of one task's do in train and eval, 38%
    in test, where an earlier choice, 480 features of the middle layer alone, was right for 89.0% only):
      features       embeddings alone 94.9 (92.4), the middle layer alone 95.1 (93.3), the last alone 91.5 (89.6),
                     embeddings and middle 96.3 (95.1), embeddings, middle and last 96.0 (94.3)
      random map     690 linear 96.3 (95.1), of leaky ReLUs 95.7 (94.0), 480 linear 95.9 (94.5)
      correlations   in float32 96.3, 16 bits 96.3, 8 bits 95.9
      ridge          on eval, 20 prompts a task: 0.5 89.1, 2 91.1, 4 92.1; 500: 96.5 each
      threshold      on eval, whole prompts: fitted whole, at 4 93% of a left-out task is found and 0.25% of known tasks
                     are lost, at 5 83% and 0.12%; fitted on both views, at 5 31% and 0.0% (without template 28%, 0.25%)
    Whole prompts were right in 99.9% or more in all of these. `benches/identify.py` has the figures on the test part.
    """

    kind: Kind = "ridge"
    num_features: int = 690
    layer: int | None = None
    ridge: float = 4.0
    threshold: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"identifier.kind is {self.kind!r}: use one of {', '.join(get_args(Kind))}", code="bad_identifier"
            )
        self._check_integer("num_features", self.num_features, 2, MAX_FEATURES)
        self._check_integer("seed", self.seed, 0, 2**32 - 1)
        if self.layer is not None:
            self._check_integer("layer", self.layer, 0, 2**31 - 1)
        self._check_number("ridge", self.ridge, 0.0, 1e6)
        self._check_number("threshold", self.threshold, 0.0, math.inf)

    @staticmethod
    def _check_integer(name: str, value: int, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"identifier.{name} is {value!r}: give an integer from {low} to {high}", code="bad_identifier"
            )

    @staticmethod
    def _check_number(name: str, value: float, low: float, high: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(
                f"identifier.{name} is {value!r}: give a number from {low} to {high}", code="bad_identifier"
            )


@dataclass(frozen=True, eq=False)
class Identification:
    """What each of B prompts was taken for, among T tasks.

    `tasks`: the T ids, ascending: the columns of `probabilities`. `task_ids` (B,) int64: the most likely task, the
    lower id at a tie; also given for a prompt that is unknown. `probabilities` (B, T) float64, rows sum to 1. `novelty`
    (B,) float64: how many standard deviations the prompt lies outside its task's own prompts, divided by the certainty
    of the choice. `unknown` (B,) bool: novelty > threshold; such a prompt is answered by the base model.
    """

    tasks: tuple[int, ...]
    task_ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    novelty: NDArray[np.float64]
    unknown: NDArray[np.bool_]
