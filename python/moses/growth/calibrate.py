"""How much each expert of a checkpoint is used on a stream: what `moses prune CHECKPOINT --calibrate STREAM` cuts by."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

from torch import Tensor

from ..errors import SurgeryError
from ..models import load_model
from ..stream import Stream, Task, load_stream
from ..stream.prompt import Collator, Kind, encode_train
from ..stream.text import packed
from .mixtures import mixtures
from .usage import measure_use

SAMPLE = 256  # examples of a task
MAX_LENGTH = 512  # tokens of an example
BATCH_SIZE = 8


def calibration_batches(
    task: Task,
    split: Literal["train", "test"],
    tokenizer: Any,
    kind: Kind,
    *,
    max_length: int = MAX_LENGTH,
    template: Literal["auto", "chat", "plain"] = "auto",
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Tensor]]:
    """The first examples of a task as a model is trained on them."""
    examples = getattr(task, split)[:SAMPLE]
    if task.is_text:
        rows = packed(tokenizer, [example.answer for example in examples], max_length)
    else:
        rows = [encode_train(tokenizer, example, max_length, kind, template=template) for example in examples]
    collate = Collator(tokenizer)
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def usage_of(
    source: str | PathLike[str], stream: Stream | str, by: Literal["use", "norm"] = "use"
) -> dict[str, list[float]]:
    """A number for each expert of a checkpoint by its block's path: the more, the more it is worth.

    Args:
        source: a model with mixtures, as `load_model` takes it.
        stream: its training examples are run.
        by: `use` counts tokens; `norm` is the router-weighted activation norm (REAP, Lasby et al., arXiv 2510.13999).

    Raises:
        SurgeryError: `no_mixture`: the model has no layer with experts.
        ModelError, StreamError: the model or the stream cannot be loaded.
    """
    read = stream if isinstance(stream, Stream) else load_stream(stream)
    model, tokenizer, kind = load_model(str(source))
    if not mixtures(model):
        raise SurgeryError(f"{source}: has no layer with experts; give a mixture of experts", code="no_mixture")
    batches = (batch for task in read.tasks for batch in calibration_batches(task, "train", tokenizer, kind))
    use = measure_use(model, batches, norms=by == "norm")
    return {block: (part.norm if by == "norm" else part.tokens.double()).tolist() for block, part in use.items()}
