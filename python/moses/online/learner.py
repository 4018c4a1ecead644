"""One segment's parameters under training: a step a batch, as the sequences come, and every sequence's loss before it is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..answers import autocast
from ..config import TrainConfig
from ..methods import Method
from ..stream.prompt import IGNORED, Collator, Kind

Row = dict[str, Any]


class SegmentReader:
    """Reads sequences with the parameters that are active in the method's model."""

    def __init__(self, method: Method, tokenizer: Any, kind: Kind, config: TrainConfig) -> None:
        self.method, self.kind, self.config = method, kind, config
        self.collate = Collator(tokenizer)

    @torch.no_grad()
    def losses(self, rows: Sequence[Sequence[Row]]) -> list[float]:
        """Mean loss of each sequence in nats a token, with the parameters as they are; a sequence is one row or more."""
        self.method.model.eval()
        batch, device = self.batch([row for sequence in rows for row in sequence])
        with autocast(device, self.config.precision):
            logits = self.method.model(**batch).logits
        sums, counts = _row_losses(logits, batch["labels"], self.kind)
        found, place = [], 0
        for sequence in rows:
            part = slice(place, place + len(sequence))
            found.append(float(sums[part].sum()) / max(1, int(counts[part].sum())))
            place += len(sequence)
        return found

    def batch(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], torch.device]:
        """The rows as tensors on the model's device, and that device."""
        device = next(self.method.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in self.collate(rows).items()}, device


class SegmentLearner(SegmentReader):
    """AdamW at a constant learning rate after a warm-up, for nobody knows how long the segment will be.

    Attributes:
        steps: taken so far.
    """

    def __init__(self, method: Method, tokenizer: Any, kind: Kind, config: TrainConfig, expected_steps: int) -> None:
        super().__init__(method, tokenizer, kind, config)
        self.steps, self._expected = 0, expected_steps
        self._callbacks = method.callbacks()
        self._parameters = [parameter for parameter in method.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def step(self, rows: Sequence[Row]) -> None:
        """Learn a batch of encoded sequences."""
        method, config = self.method, self.config
        method.model.train()
        warm = max(1, math.ceil(config.warmup_ratio * self._expected))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (self.steps + 1) / warm)
        batch, device = self.batch(rows)
        with autocast(device, config.precision):
            with method.watch() as seen:
                outputs = method.model(**batch)
            loss = outputs.loss
            extra = method.extra_loss(method.model, batch, outputs, seen)
        (loss if extra is None else loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        state: Any = SimpleNamespace(global_step=self.steps, max_steps=self._expected)
        control: Any = None
        for callback in self._callbacks:
            callback.on_step_end(control, state, control)


def _row_losses(logits: Tensor, labels: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Sums (B,) of the losses of the labels of each row, and (B,) how many there are."""
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(dim=1), (labels != IGNORED).sum(dim=1)
