"""SARI, the measure of text simplification (Xu et al. 2016, TACL 4:401-415), in the variant that TRACE uses.

That is Hugging Face's: text in lower case and tokenized as mteval's 13a, 0/0 counted as 1, and keep's recall over all
n-grams that should be kept (cocoxu/simplification issue 6). No kept package on PyPI has it without a hub.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4  # n-grams of 1 to 4 words

# mteval-v13a: a blank around symbols, around stops that are not inside numbers, and after a digit's dash
_13A = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))

Counts = Counter[tuple[str, ...]]


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """How well words were kept, deleted and added on the way from the source to the prediction, 0..1, against 1 or more
    references.

    The mean over orders 1 to 4 of (F1 of kept, precision of deleted, F1 of added n-grams) / 3.
    """
    words = [tokenize(text) for text in (source, prediction, *references)]
    total = 0.0
    for order in range(1, MAX_ORDER + 1):
        counts = [Counter(zip(*(text[start:] for start in range(order)), strict=False)) for text in words]
        total += _order_score(counts[0], counts[1], counts[2:])
    return total / MAX_ORDER


def tokenize(text: str) -> list[str]:
    """Words in lower case, split as mteval's 13a."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _13A:
        text = pattern.sub(replacement, text)
    return text.split()


def _order_score(source: Counts, prediction: Counts, references: Sequence[Counts]) -> float:
    wanted: Counts = sum(references, Counter())
    # source and prediction count once for each reference, so that n-grams are weighed by how many references agree
    source_all = Counter({gram: count * len(references) for gram, count in source.items()})
    prediction_all = Counter({gram: count * len(references) for gram, count in prediction.items()})

    kept = source_all & prediction_all
    kept_rightly, keepable = kept & wanted, source_all & wanted
    keep_precision = _ratio(sum(kept_rightly[gram] / kept[gram] for gram in kept_rightly), len(kept))
    keep_recall = _ratio(kept_rightly.total(), keepable.total())

    deleted = source_all - prediction_all
    deleted_rightly = deleted - wanted
    delete_precision = _ratio(sum(deleted_rightly[gram] / deleted[gram] for gram in deleted_rightly), len(deleted))

    added, addable = set(prediction) - set(source), set(wanted) - set(source)
    add_precision, add_recall = _ratio(len(added & addable), len(added)), _ratio(len(added & addable), len(addable))
    return (_f1(keep_precision, keep_recall) + delete_precision + _f1(add_precision, add_recall)) / 3


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
