"""Which ended task a new one starts from: the one whose sub-experts serve the new task's own training examples best.

Every ended task answers a sample of the examples with its frozen parameters. A language model is asked for its loss on the
answers. A classifier, which has no head for the new task yet, is asked how well a ridge regression from what reaches its head
predicts the labels, each example left out once: the linear probe by which transferability is usually measured (Kornblith et
al., CVPR 2019), in closed form. The base model is asked as well, and where it does best the task starts afresh.
No example of an earlier task is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .answers import autocast
from .heads import TaskHead
from .methods import Method
from .stream.prompt import Collator

MAX_EXAMPLES, MIN_EXAMPLES = 256, 16  # a candidate
SHARE = 0.1  # of the cost of training the task, over all candidates; a forward is a third of a step
RIDGES = (0.01, 0.1, 1.0, 10.0)  # times the mean square of the features


class _AtTheHead(Exception):  # noqa: N818
    """Ends a classifier's forward when what reaches its head is there."""


@dataclass(frozen=True)
class DonorProbe:
    """Asks ended tasks how well they serve a new one.

    Attributes:
        method: holds the ended tasks.
        tokenizer: for padding.
        precision: as in training.
        batch_size: examples a forward.
        epochs: of the training that the probe is a small share of.
    """

    method: Method
    tokenizer: Any
    precision: str
    batch_size: int
    epochs: int

    def best(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """The ended task with the lowest cost on `rows` (a task's encoded training examples); None is the base model.

        Equal costs go to the base model, then to the earlier task.
        """
        names = [None, *(info.name for info in self.method.registry.tasks() if info.state == "ended")]
        if len(names) == 1:
            return None
        affordable = int(SHARE * 3 * self.epochs * len(rows) / len(names))
        wanted = min(len(rows), MAX_EXAMPLES, max(MIN_EXAMPLES, affordable))
        sample = [rows[index * len(rows) // wanted] for index in range(wanted)]
        sample.sort(key=lambda row: len(row["input_ids"]))
        costs = [self._cost(name, sample) for name in names]
        return names[costs.index(min(costs))]

    @torch.no_grad()
    def _cost(self, name: str | None, sample: Sequence[dict[str, Any]]) -> float:
        model = self.method.model
        head = next((module for module in model.modules() if isinstance(module, TaskHead)), None)
        training = model.training
        model.eval()
        try:
            with self.method.answer(name), autocast(next(model.parameters()).device, self.precision):
                return self._loss(model, sample) if head is None else self._probe_error(model, head, sample)
        finally:
            model.train(training)

    def _loss(self, model: nn.Module, sample: Sequence[dict[str, Any]]) -> float:
        total, tokens = 0.0, 0
        for batch in self._batches(model, sample):
            count = int((batch["labels"] >= 0).sum())
            total += float(model(**batch).loss) * count
            tokens += count
        return total / max(tokens, 1)

    def _probe_error(self, model: nn.Module, head: TaskHead, sample: Sequence[dict[str, Any]]) -> float:
        reached: list[Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached.append(inputs[0].float())
            raise _AtTheHead

        handle = head.register_forward_pre_hook(stop)
        try:
            for batch in self._batches(model, sample):
                batch.pop("labels")
                with suppress(_AtTheHead):
                    model(**batch)
        finally:
            handle.remove()
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in reached]).double().cpu()
        return left_out_error(features, torch.tensor([row["labels"] for row in sample]))

    def _batches(self, model: nn.Module, sample: Sequence[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device
        collate = Collator(self.tokenizer)
        for start in range(0, len(sample), self.batch_size):
            batch = collate(sample[start : start + self.batch_size])
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def left_out_error(features: Tensor, labels: Tensor) -> float:
    """Mean square error of a ridge regression from features to labels, each example left out once; 1 is a constant's.

    Args:
        features: (n, D) float64.
        labels: (n,) int64 classes.

    Returns:
        The least over `RIDGES`, in the closed form of leaving one out: (h_ii is the hat matrix's diagonal)
        e_i = (y_i - ŷ_i) / (1 - h_ii).
    """
    n = features.shape[0]
    x = features - features.mean(0)
    y = torch.nn.functional.one_hot(labels - labels.min()).double()
    y = y - y.mean(0)
    spread = float((y * y).sum()) or 1.0
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0.0)
    scale = float(values.mean()) or 1.0
    errors = []
    for ridge in RIDGES:
        shrink = values / (values + ridge * scale)
        hat = (vectors * shrink) @ vectors.T
        left = 1.0 - hat.diagonal() - 1.0 / n
        residual = (y - hat @ y) / left.clamp(min=1e-9)[:, None]
        errors.append(float((residual * residual).sum()) / spread)
    return min(errors)
