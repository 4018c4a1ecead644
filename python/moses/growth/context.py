"""What the growing layers of one model share: which experts are visible, of which domain the tokens are, and what an onlooker sees of the routes.

As `moses.context`, it holds no weights: answering for another task is one assignment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..routes import RouterOutput


@dataclass
class GrowthContext:
    """The state of the next forward.

    Attributes:
        visible: by a layer's path, how many of its experts (the oldest) routes may name; None, and paths that are not named, are all.
        domain: row of the layers' tables that tokens are routed by (random routing); -1 is the dense FFN that was there at first.
        token_ids: (batch, tokens) int64 of the forward that is under way, by the hook of `follow_tokens`.
        seen: where layers leave (path, what their router said) while someone watches; None while nobody does.
    """

    visible: Mapping[str, int] | None = None
    domain: int = -1
    token_ids: Tensor | None = None
    seen: list[tuple[str, RouterOutput]] | None = field(default=None, repr=False)

    @contextmanager
    def use(self, visible: Mapping[str, int] | None = None, domain: int = -1) -> Iterator[None]:
        """Answer with these experts inside the with block, and as before after it."""
        before = self.visible, self.domain
        self.visible, self.domain = visible, domain
        try:
            yield
        finally:
            self.visible, self.domain = before

    @contextmanager
    def watch(self) -> Iterator[list[tuple[str, RouterOutput]]]:
        """What each layer's router says inside the with block, in the order of the layers' forwards."""
        before, seen = self.seen, []  # type: ignore[var-annotated]
        self.seen = seen
        try:
            yield seen
        finally:
            self.seen = before

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Nobody watches inside the with block."""
        before, self.seen = self.seen, None
        try:
            yield
        finally:
            self.seen = before

    def ids_of(self, x: Tensor, path: str) -> Tensor:
        """(T,) token ids of x (batch, tokens, D). Raises `ModelError` (`token_ids_needed`) where the model was called without, or with others."""
        ids = self.token_ids
        if ids is None or ids.numel() * x.shape[-1] != x.numel():
            found = "none" if ids is None else f"{tuple(ids.shape)}"
            raise ModelError(
                f"{path} routes by token id: its input is {tuple(x.shape)} and the model's input_ids are {found}; call the model with input_ids",
                code="token_ids_needed",
            )
        return ids.reshape(-1)


def follow_tokens(model: nn.Module, context: GrowthContext) -> None:
    """Let `context` know the token ids of every forward of `model`, until its end."""
    # partials, not closures: a deep copy of the model has hooks that tell the copied context
    model.register_forward_pre_hook(partial(_before, context), with_kwargs=True)
    model.register_forward_hook(partial(_after, context), always_call=True)


def _before(context: GrowthContext, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    context.token_ids = ids if isinstance(ids, Tensor) and not torch.is_floating_point(ids) else None


def _after(context: GrowthContext, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    context.token_ids = None
