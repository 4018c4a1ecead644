"""How well a language model predicts texts: negative log-likelihoods, and perplexity, exp of their mean over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .answers import autocast
from .config import TrainConfig
from .errors import RunError
from .stream.prompt import IGNORED, Collator
from .stream.text import windows

MAX_LOGITS = 1 << 26
"""Logits of one batch: a quarter of a gibibyte in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class TextLoss:
    """The negative log-likelihood of one text, summed over its tokens, and their number."""

    nll: float
    num_tokens: int


def perplexity(losses: Sequence[TextLoss]) -> float:
    """exp of the mean over all tokens of all texts. Raises RunError for no token at all, and for a loss that is not finite."""
    num_tokens = sum(loss.num_tokens for loss in losses)
    if num_tokens == 0:
        raise RunError("nothing to score: the task has no test texts", code="nothing_to_score")
    mean = math.fsum(loss.nll for loss in losses) / num_tokens
    if not mean < 700.0:  # nan, or what exp takes beyond a double
        raise RunError(
            f"the model's loss on the test texts is {mean:g} a token: lower learning_rate, or load it in float32",
            code="diverged",
        )
    return math.exp(mean)


@dataclass(frozen=True)
class TextScorer:
    """Scores texts with whatever parameters are active in the model.

    Attributes:
        tokenizer: of the model.
        config: window length, batch size and precision are read from it.
    """

    tokenizer: object
    config: TrainConfig

    @torch.no_grad()
    def losses(
        self, model: nn.Module, texts: Sequence[str], tick: Callable[[int], None] | None = None
    ) -> list[TextLoss]:
        """The loss of each text, cut in windows of `max_length` tokens; `tick` is told how many texts are done, at the end."""
        model.eval()
        device = next(model.parameters()).device
        rows = [
            (place, window)
            for place, text in enumerate(texts)
            for window in windows(self.tokenizer, text, self.config.max_length)  # type: ignore[arg-type]
        ]
        # windows of like length together; the order of equal ones is the texts', so that a batch owes nothing to chance
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index][1]), index))
        sums = [0.0] * len(texts)
        counts = [0] * len(texts)
        collate = Collator(self.tokenizer)  # type: ignore[arg-type]
        for part in self._batches(order, [len(window) for _, window in rows], _vocabulary(model)):
            encoded = [
                {"input_ids": window, "attention_mask": [1] * len(window), "labels": [IGNORED, *window[1:]]}
                for window in (rows[index][1] for index in part)
            ]
            batch = {name: tensor.to(device) for name, tensor in collate(encoded).items()}
            labels = batch.pop("labels")
            with autocast(device, self.config.precision):
                logits = model(**batch).logits
            for index, nll in zip(part, _row_losses(logits, labels).tolist(), strict=True):
                place, window = rows[index]
                sums[place] += nll
                counts[place] += len(window) - 1
        if tick is not None:
            tick(len(texts))
        return [TextLoss(nll, count) for nll, count in zip(sums, counts, strict=True)]

    def _batches(self, order: Sequence[int], lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for index in order:  # the last of a batch is its longest
            most = min(self.config.eval_batch_size, max(1, MAX_LOGITS // (lengths[index] * vocabulary)))
            if not batches or len(batches[-1]) >= most:
                batches.append([])
            batches[-1].append(index)
        return batches


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(model.config, "vocab_size", None) or 1 << 16)


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) float64 sums of the losses of each row's labels; the last logits of a row predict nothing."""
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.double().sum(1).cpu()
