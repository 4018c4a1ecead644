"""How a text becomes a language model's input: rows to learn from, windows to be judged by. Needs no torch.

Guarantees: every token of a text is predicted exactly once, in training rows and in windows alike; no token of another
text, and none that the tokenizer adds, is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moses.errors import StreamError
from moses.stream.prompt import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[list[int]]:
    """The text's tokens in windows of at most `max_length`, each behind a start token; the first token of a window sees that
    alone. Raises StreamError where no token of the text is left."""
    ids = _ids(tokenizer, text)
    if not ids:
        raise StreamError(f"the tokenizer makes no token of the text {text[:40]!r}: remove it", code="empty_text")
    start = start_token(tokenizer)
    return [[start, *part] for part in _parts(ids, max_length - 1)]


def packed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int) -> list[dict[str, Any]]:
    """Rows of `max_length` tokens (the last one shorter) to learn from: the texts one after the other, each behind a start token.

    A row is `input_ids`, `attention_mask` and `labels`, lists of one length; labels are -100 at start tokens.
    """
    start = start_token(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for text in texts:
        found = _ids(tokenizer, text)
        ids += [start, *found]
        labels += [IGNORED, *found]
    rows = []
    # a row begins with a start token of its own; where a text begins just there, one is enough
    place = 0
    while place < len(ids):
        first = place + (labels[place] == IGNORED)
        part = slice(first, first + max_length - 1)
        inputs = [start, *ids[part]]
        if len(inputs) > 1:
            rows.append({"input_ids": inputs, "attention_mask": [1] * len(inputs), "labels": [IGNORED, *labels[part]]})
        place = part.stop
    return rows


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text: the tokenizer's first token, or the one that ends the text before it."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise StreamError("the tokenizer has no start, end or pad token: set bos_token", code="no_start_token")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _parts(ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(ids[place : place + size]) for place in range(0, len(ids), size)]
