"""A prompt's features: the frozen activations of one layer, averaged over the prompt's tokens.

Guarantees: only the blocks up to that layer are run; a row's features depend neither on padding (its side or amount)
nor on the other rows of the batch, beyond rounding. Every token's activation is brought to unit size before the mean:
in most language models the first token's is hundreds of times larger than the rest (massive activations, Sun et al.
2024), and would drown the prompt. The caller switches adapters off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from moses.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


class _StopForward(Exception):  # noqa: N818
    """Ends a forward pass once the last wanted activation is there."""


def prompt_features(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, layer: int | None = None
) -> torch.Tensor:
    """(batch, 2, D) float32 on the model's device: the mean of each prompt's embeddings, which know the words, and its
    mean activation after `layer` blocks of the model's trunk, which knows what is said with them.

    `layer`: 0 (the embeddings) to the number of blocks; None: half of them. An encoder-decoder is read at its encoder.
    `input_ids`, `attention_mask`: (batch, tokens) integers, padded on either side. No gradient; the model's mode is
    left as it is. Raises ModelError where the blocks cannot be found, ConfigError for a layer or shape that does not
    fit or a prompt without tokens.
    """
    blocks = _blocks(_trunk(model))
    layer = len(blocks) // 2 if layer is None else layer
    return layer_features(model, input_ids, attention_mask, [0, layer])


def layer_features(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, layers: Sequence[int]
) -> torch.Tensor:
    """(batch, len(layers), D) float32: as `prompt_features`, for any layers, in one pass."""
    import torch

    trunk = _trunk(model)
    blocks = _blocks(trunk)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= len(blocks):
            raise ConfigError(
                f"identifier.layer is {layer!r}: give 0 to {len(blocks)}, or None for the middle", code="bad_identifier"
            )
    device = next(trunk.parameters()).device
    ids, mask = _left_aligned(input_ids.to(device), attention_mask.to(device))
    training = [module for module in trunk.modules() if module.training]
    for module in training:
        module.training = False  # without dropout
    try:
        with torch.no_grad():
            activations = _activations(trunk, blocks, sorted(set(layers)), ids, mask)
    finally:
        for module in training:
            module.training = True
    return torch.stack([_mean(activations[layer], mask) for layer in layers], dim=1)


def features_of_encoded(
    model: nn.Module, encoded: Sequence[Sequence[int]], layer: int | None = None, batch_size: int = 16
) -> torch.Tensor:
    """(prompts, 2, D) float32 on the CPU, in the order of `encoded`, the token ids of each prompt; batched by length.

    Encode prompts here as they are encoded for answering: a chat template that only one side has is another prompt.
    """
    import torch

    if not encoded or not all(len(row) for row in encoded):
        raise ConfigError("no prompts, or one without tokens: give at least one of each", code="bad_features")
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    features: list[torch.Tensor] = [torch.empty(0)] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(encoded[index]) for index in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, : len(encoded[index])] = torch.tensor(list(encoded[index]))
            mask[row, : len(encoded[index])] = 1
        for index, feature in zip(chosen, prompt_features(model, ids, mask, layer).cpu(), strict=True):
            features[index] = feature
    return torch.stack(features)


def _trunk(model: Any) -> Any:
    """The base model without its head; the encoder of an encoder-decoder."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper: a hook that raises must not be traced
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)


def _blocks(trunk: Any) -> Any:
    """The trunk's list of blocks: the outermost ModuleList with as many members as the configuration has layers."""
    from torch import nn

    config = getattr(trunk, "config", None)
    if config is not None:
        wanted = getattr(config.get_text_config(), "num_hidden_layers", None)
        lists = [
            (name, module)
            for name, module in trunk.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == wanted
        ]
        if lists:
            return min(lists, key=lambda item: item[0].count("."))[1]
    raise ModelError(
        f"{type(trunk).__name__}: found no list of blocks to read features from: use identifier kind 'prompt_loss'",
        code="no_blocks",
    )


def _left_aligned(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's tokens first and its padding after them, cut to the longest row.

    So positions count from the prompt's first token in every architecture, also where they are absolute (GPT-2, BERT).
    """
    import torch

    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ConfigError(
            f"input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}: give both as (batch, tokens)",
            code="bad_features",
        )
    real = mask != 0
    lengths = real.sum(dim=1)
    if not ids.numel() or int(lengths.min()) == 0:
        raise ConfigError("a prompt without tokens: give each at least one", code="bad_features")
    order = torch.argsort(~real, dim=1, stable=True)[:, : int(lengths.max())]
    return ids.gather(1, order), real.gather(1, order).to(mask.dtype)


def _activations(
    trunk: Any, blocks: Any, layers: list[int], ids: torch.Tensor, mask: torch.Tensor
) -> dict[int, torch.Tensor]:
    """(batch, tokens, D) after each number of blocks in `layers`, ascending; the pass ends at the last of them."""
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, hidden: torch.Tensor) -> None:
        found[layer] = hidden
        if layer == layers[-1]:
            raise _StopForward

    def before(layer: int) -> Callable[..., None]:
        return lambda module, args, kwargs: keep(layer, args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(len(blocks), output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in layers:
            if layer < len(blocks):
                handle = blocks[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
            else:
                handle = blocks[-1].register_forward_hook(after)
            hooks.callback(handle.remove)
        try:
            trunk(input_ids=ids, attention_mask=mask)
        except _StopForward:
            return found
    raise ModelError(
        f"{type(trunk).__name__}: its forward pass does not reach block {layers[-1]}: use kind 'prompt_loss'",
        code="no_blocks",
    )


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, D) float32: mean over the real tokens of activations with a root mean square of 1."""
    import torch

    hidden = hidden.float()
    hidden = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + math.ulp(1.0))
    # padding is cut out, not multiplied by 0: a row that attends to nothing may be NaN, and 0·NaN is NaN
    real = (mask != 0).unsqueeze(-1)
    return torch.where(real, hidden, 0.0).sum(dim=1) / real.sum(dim=1)
