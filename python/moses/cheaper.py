"""A cheaper training step with the same loss: logits only where something is learned, and the attention that trains fastest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .stream.prompt import IGNORED

# up to so many tokens a row (measured on two cores, SmolLM2: 0.8 times as long at 150 tokens, 0.94 at 256, the same at 512, longer at 1,024)
SHORT = 256


def at_learned_columns(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of a decoder with logits asked for only at the columns where some row has a label; as it is, where these are all or none.

    A prompt's tokens are most of a batch and have no label, and the vocabulary is wide: the loss is the same sum without them.

    Args:
        model: a model of transformers, or PEFT's around one. Where it does not hand `shift_labels` on to transformers' loss, nothing changes.
        inputs: `labels` (rows, tokens) int64, and what else the model takes.

    Returns:
        The inputs, with `logits_to_keep` (columns,) int64 and `shift_labels` (rows, columns): the label of the token after each column.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or not _keeps_logits(type(inner(model))):
        return dict(inputs)
    columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    if columns.numel() in (0, labels.shape[1] - 1) or _loss_of(inner(model)) != "ForCausalLMLoss":
        return dict(inputs)
    return {**inputs, "logits_to_keep": columns, "shift_labels": labels[:, columns + 1]}


@contextmanager
def training_attention(model: nn.Module, max_length: int, half: bool) -> Iterator[None]:
    """Inside the with block, attention by matrix products where that is the faster to train: short rows in half precision on a CPU.

    The backward of torch's fused attention takes ten times as long as its forward there (torch 2.15). The model goes back to the attention
    it had.

    Args:
        model: as for `at_learned_columns`.
        max_length: tokens of the longest row.
        half: whether the attention runs in bfloat16 or float16.
    """
    model = inner(model)
    config: Any = getattr(model, "config", None)
    devices = {parameter.device.type for parameter in model.parameters()}
    before = getattr(config, "_attn_implementation", None)
    if before != "sdpa" or not half or max_length > SHORT or devices != {"cpu"}:
        yield
        return
    whole: Any = model
    whole.set_attn_implementation("eager")
    try:
        yield
    finally:
        whole.set_attn_implementation(before)


def inner(model: nn.Module) -> nn.Module:
    """The model of transformers that PEFT's goes around, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _keeps_logits(kind: type[nn.Module]) -> bool:
    """Whether a class computes logits where it is told to and hands other arguments on to transformers' loss."""
    forward = inspect.unwrap(kind.forward)
    parameters = inspect.signature(forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return open_ended and "logits_to_keep" in parameters and "loss_function" in forward.__code__.co_names


def _loss_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "loss_function", None), "__name__", ""))
