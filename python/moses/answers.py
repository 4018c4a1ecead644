"""Answers of a model to prompts: greedy text of a language model, or the label of a classifier.

Prompts go in batches of like length, padded on the left for decoders, so that equal inputs give equal answers whatever
stands in the file around them, up to the rounding of a batch's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .stream.prompt import Collator, Cuts, Kind, encode_prompt


@dataclass(frozen=True)
class TaskFormat:
    """How the answers of a task are read off: at most so many new tokens, or the label names of a classifier."""

    max_new_tokens: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Answerer:
    """Turns prompts into answers with whatever parameters are active in the model.

    Attributes:
        tokenizer: of the model.
        kind: `causal`, `seq2seq` or `classifier`.
        config: batch size, lengths, template and precision are read from it.
    """

    tokenizer: object
    kind: Kind
    config: TrainConfig

    def batches(
        self, prompts: Sequence[str], max_new_tokens: int, cuts: Cuts | None = None
    ) -> list[tuple[list[int], dict[str, Tensor]]]:
        """(indices into `prompts`, batch of input_ids and attention_mask) with prompts of like length together."""
        room = self.config.max_length - (max_new_tokens if self.kind == "causal" else 0)
        rows = [
            encode_prompt(self.tokenizer, prompt, room, self.kind, template=self.config.template, cuts=cuts)  # type: ignore[arg-type]
            for prompt in prompts
        ]
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]["input_ids"]), index))
        collate = Collator(self.tokenizer, side="left" if self.kind == "causal" else "right")  # type: ignore[arg-type]
        size = self.config.eval_batch_size
        return [
            (order[start : start + size], collate([rows[index] for index in order[start : start + size]]))
            for start in range(0, len(order), size)
        ]

    @torch.no_grad()
    def answer(
        self,
        model: nn.Module,
        prompts: Sequence[str],
        form: TaskFormat,
        cuts: Cuts | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> list[str]:
        """One answer a prompt; `tick` is told how many prompts are done after each batch."""
        model.eval()
        device = next(model.parameters()).device
        answers = [""] * len(prompts)
        for indices, batch in self.batches(prompts, form.max_new_tokens, cuts):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with autocast(device, self.config.precision):
                texts = (
                    self._classify(model, batch, form)
                    if self.kind == "classifier"
                    else self._generate(model, batch, form)
                )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
            if tick is not None:
                tick(len(indices))
        return answers

    def _classify(self, model: nn.Module, batch: dict[str, Tensor], form: TaskFormat) -> list[str]:
        best = model(**batch).logits.float().argmax(-1)
        return [form.labels[index] for index in best.tolist()]

    def _generate(self, model: nn.Module, batch: dict[str, Tensor], form: TaskFormat) -> list[str]:
        tokenizer = self.tokenizer
        tokens = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=form.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
        )
        start = batch["input_ids"].shape[1] if self.kind == "causal" else 0
        texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)  # type: ignore[attr-defined]
        return [text.strip() for text in texts]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision as the Trainer has it, for evaluation to see what training saw."""
    return torch.autocast(
        device.type, dtype=torch.float16 if precision == "float16" else torch.bfloat16, enabled=precision != "float32"
    )
