"""How a prompt becomes a model's input: chat template or plain text, what is cut, what is masked, how a batch is
padded.

Causal model: prompt, answer, end token, and labels of -100 on the prompt, so that only the answer is learned.
Encoder-decoder: the prompt goes in, the answer is the label. Classifier: the prompt goes in, the label is the answer's
number. Guarantees: a prompt is cut in its middle, so that the question at its head and the cue at its tail stay, and
every cut is counted; an answer is never cut; a prompt that is not cut is given to generation exactly as training showed
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moses.errors import StreamError
from moses.stream.task import Example

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Kind = Literal["causal", "seq2seq", "classifier"]
"""What a model answers with: text after the prompt, text from a decoder, or one of a fixed list of labels."""

Template = Literal["auto", "chat", "plain"]
"""Of causal models: the tokenizer's chat template (auto: where it has one), or the bare text."""

IGNORED = -100  # the label that transformers' losses leave out
MAX_LABELS = 1000  # more different answers than this are text, not labels
_MIN_PROMPT_TOKENS = 16  # less of a prompt than this is no question any more


@dataclass
class Cuts:
    """How many prompts were seen, how many were longer than `max_length` tokens and cut, and the longest (in
    tokens)."""

    seen: int = 0
    cut: int = 0
    longest: int = 0
    max_length: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cut} of {self.seen} prompts were cut in the middle to fit {self.max_length} tokens "
            f"(the longest has {self.longest})"
        )


def encode_train(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int,
    kind: Kind,
    *,
    labels: Sequence[str] | None = None,
    template: Template = "auto",
    cuts: Cuts | None = None,
) -> dict[str, Any]:
    """One example to learn from: `input_ids` and `attention_mask` (lists of length at most `max_length`), and `labels`.

    `labels` of the result: causal, as long as `input_ids`, -100 on the prompt; seq2seq, the answer's ids and the end
    token; classifier, the place of the answer in `labels`, the argument (-100 where it is not there). Raises
    StreamError where the answer does not fit.
    """
    if kind == "classifier":
        encoded = encode_prompt(tokenizer, example.prompt, max_length, kind, cuts=cuts)
        index = {label: place for place, label in enumerate(labels or ())}
        return {**encoded, "labels": index.get(example.answer.strip(), IGNORED)}
    if kind == "seq2seq":
        answer = _ids(tokenizer(text_target=example.answer))
        _require_room(max_length - len(answer), 0, answer, example, max_length)
        return {**encode_prompt(tokenizer, example.prompt, max_length, kind, cuts=cuts), "labels": answer}
    prompt, answer = _causal_ids(tokenizer, example, template)
    room = max_length - len(answer)
    _require_room(room, min(len(prompt), _MIN_PROMPT_TOKENS), answer, example, max_length)
    prompt = _cut(prompt, room, cuts)
    input_ids = prompt + answer
    return {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [IGNORED] * len(prompt) + answer,
    }


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    kind: Kind,
    *,
    template: Template = "auto",
    cuts: Cuts | None = None,
) -> dict[str, list[int]]:
    """A prompt to answer: `input_ids` and `attention_mask`, at most `max_length` tokens (leave room for a causal
    model's answer)."""
    if max_length < _MIN_PROMPT_TOKENS:
        raise StreamError(
            f"{max_length} tokens are left for a prompt, {_MIN_PROMPT_TOKENS} are the least: "
            "raise max_length or lower max_new_tokens",
            code="no_room",
        )
    ids = _prompt_ids(tokenizer, prompt, template) if kind == "causal" else _ids(tokenizer(prompt))
    ids = _cut(ids, max_length, cuts)
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def label_names(examples: Iterable[Example]) -> list[str]:
    """The different answers, sorted: the labels of a classifier. Raises StreamError where they are too many or too few
    to be labels."""
    answers = [example.answer.strip() for example in examples]
    names = sorted(set(answers))
    if len(names) < 2:
        raise StreamError(f"{len(names)} different answer(s): a classifier needs 2 or more", code="not_classification")
    if len(names) > MAX_LABELS or (len(names) > 20 and 2 * len(names) > len(answers)):
        raise StreamError(
            f"{len(names)} different answers in {len(answers)} examples: "
            "a task for a model that writes text, not for a classifier",
            code="not_classification",
        )
    return names


@dataclass(frozen=True)
class Collator:
    """Makes a batch of encoded examples: `input_ids` and `attention_mask` (rows, longest row), `labels` where the rows
    have them.

    `side`: where the padding goes, "right" to train, "left" to generate with a causal model. Other numbers of a row (a
    task's number, say) become a tensor (rows,) under their name. All tensors are int64.
    """

    tokenizer: PreTrainedTokenizerBase
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of at least one row; every row has the fields of the first."""
        import torch

        padding = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if not isinstance(values[0], int):
                values = self._pad(values, padding[name])
            batch[name] = torch.tensor(values, dtype=torch.int64)
        return batch

    def _pad(self, values: Sequence[Sequence[int]], padding: int) -> list[list[int]]:
        longest = max(map(len, values))
        if self.side == "left":
            return [[padding] * (longest - len(value)) + list(value) for value in values]
        return [list(value) + [padding] * (longest - len(value)) for value in values]


def _causal_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, template: Template
) -> tuple[list[int], list[int]]:
    prompt = _prompt_ids(tokenizer, example.prompt, template)
    end = [tokenizer.eos_token_id]
    if _is_chat(tokenizer, template):
        return prompt, _ids(tokenizer(example.answer, add_special_tokens=False)) + end
    # a word after text has its own token, that with the space; tokenizers differ in how they make it, so the whole text
    # is asked
    gap = "" if example.prompt[-1:].isspace() or example.answer[:1].isspace() else " "
    whole = _without_end(tokenizer, _ids(tokenizer(example.prompt + gap + example.answer)))
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return prompt, whole[len(prompt) :] + end
    return prompt, _ids(tokenizer(gap + example.answer, add_special_tokens=False)) + end


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, template: Template) -> list[int]:
    if not _is_chat(tokenizer, template):
        return _without_end(tokenizer, _ids(tokenizer(prompt)))
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return _ids(tokenizer(text, add_special_tokens=False))


def _is_chat(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise StreamError("the tokenizer has no chat template: use template 'plain'", code="no_chat_template")
    return has_template if template == "auto" else template == "chat"


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    # some tokenizers end every text; a prompt goes on
    return ids[:-1] if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids


def _cut(ids: list[int], room: int, cuts: Cuts | None) -> list[int]:
    """The first and the last tokens, `room` in all."""
    if cuts is not None:
        cuts.seen += 1
        cuts.cut += len(ids) > room
        cuts.longest = max(cuts.longest, len(ids))
        cuts.max_length = max(cuts.max_length, room)
    if len(ids) <= room:
        return ids
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]


def _require_room(room: int, needed: int, answer: list[int], example: Example, max_length: int) -> None:
    if room < needed:
        raise StreamError(
            f"the answer to {example.prompt[:40]!r} has {len(answer)} tokens, and max_length is {max_length}: "
            "raise max_length or shorten the answer",
            code="answer_too_long",
        )


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])
