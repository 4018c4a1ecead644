"""Scores of answers, and the measures of continual learning.

Every score is the mean over items, in 0..100. An answer that is empty scores 0, whatever the metric says of it.
Libraries are imported when a metric needs them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from moses.errors import RunError, StreamError
from moses.sari import sari

Matrix = Sequence[Sequence[float | None]]

# what may stand around an answer and means nothing: Unicode's other, open and close punctuation, and blanks; no dash
_AROUND = {"Po", "Ps", "Pe", "Pi", "Pf", "Zs"}
_MEANINGFUL = "%&#@/\\"
# one ideogram, or a run of other letters and digits: rouge-score's own tokenizer knows ASCII only, and is the same
# there
_ROUGE_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_PY150_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def score(metric: str, predictions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> float:
    """The mean of `score_items`, 0..100. Raises RunError for no items at all."""
    items = score_items(metric, predictions, answers, prompts)
    if not items:
        raise RunError("nothing to score: the task has no test examples", code="nothing_to_score")
    return sum(items) / len(items)


def score_items(metric: str, predictions: Sequence[str], answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Each prediction's score against its answer, 0..100; the prompt is what SARI compares with.

    Metrics: `accuracy` (equal after `normalise`), `exact_match` (equal but for white space around), `rouge_l` (F1,
    rouge-score, Lin 2004), `edit_similarity` (rapidfuzz's ratio, as TRACE's Py150), `sari` (Xu et al. 2016). Raises
    StreamError for another name, RunError for lists of different lengths.
    """
    if metric not in _SCORES:
        raise StreamError(f"unknown metric {metric!r}: use one of {', '.join(_SCORES)}", code="unknown_metric")
    if not len(predictions) == len(answers) == len(prompts):
        counts = f"{len(predictions)} predictions, {len(answers)} answers, {len(prompts)} prompts"
        raise RunError(f"{counts}: give as many of each", code="length_mismatch")
    of_item = _SCORES[metric]
    return [
        100.0 * of_item(prediction, answer, prompt) if prediction.strip() and answer.strip() else 0.0
        for prediction, answer, prompt in zip(predictions, answers, prompts, strict=True)
    ]


def normalise(answer: str) -> str:
    """The first line that is not empty, in lower case, single-spaced, without quotes, brackets and stops around it."""
    for line in answer.splitlines():
        words = " ".join(line.split())
        if words:
            first, last = 0, len(words)
            while first < last and _is_around(words[first]):
                first += 1
            while last > first and _is_around(words[last - 1]):
                last -= 1
            return (words[first:last] or words).casefold()
    return ""


def _is_around(character: str) -> bool:
    return character == "`" or (character not in _MEANINGFUL and unicodedata.category(character) in _AROUND)


def transfer_metrics(
    matrix: Matrix, base: Sequence[float | None], lower_is_better: bool = False
) -> dict[str, float | None]:
    """The measures op, avg, bwt, fwt and forgetting of T tasks, in the unit of the scores.

    `matrix[t][i]`: score on task i after training task t, both from 0 (T rows of T). `base[i]`: the untrained model's
    score.

        op  = (1/T) sum_i R[T][i]                         avg = mean over t of (1/t) sum_{i<=t} R[t][i]
        bwt = (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i])     fwt = (1/(T-1)) sum_{i>=2} (R[i-1][i] - R[0][i])
        forgetting = (1/(T-1)) sum_{i<T} (max_{t>=i} R[t][i] - R[T][i]): a task can be forgotten once it was learned
    (bwt, fwt: Lopez-Paz and Ranzato 2017; forgetting: Chaudhry et al. 2018.)

    Where a lower score is better (perplexity), bwt and fwt stay the same differences, so that a positive one is a loss; forgetting is
    R[T][i] - min_{t>=i} R[t][i], which is never negative and a loss in both cases.

    A measure that needs a cell that is None (a task whose head is not there yet) is None, and so are the last three
    where T = 1. Raises RunError for a matrix that is not T by T.
    """
    size = len(base)
    if size == 0 or len(matrix) != size or any(len(row) != size for row in matrix):
        shape = f"{len(matrix)} rows of {sorted({len(row) for row in matrix})}"
        raise RunError(f"the matrix has {shape}, for {size} tasks: give T rows of T", code="bad_matrix")
    last, learned = matrix[-1], range(size - 1)
    return {
        "op": _mean(last),
        "avg": _mean([_mean(row[: t + 1]) for t, row in enumerate(matrix)]),
        "bwt": _mean([_difference(last[i], matrix[i][i]) for i in learned]),
        "fwt": _mean([_difference(matrix[i - 1][i], base[i]) for i in range(1, size)]),
        "forgetting": _mean([_lost([row[i] for row in matrix[i:]], lower_is_better) for i in learned]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _lost(column: Sequence[float | None], lower_is_better: bool) -> float | None:
    """How far the last score of a task is from the best since it was learned."""
    known = [value for value in column if value is not None]
    if column[-1] is None:
        return None
    return column[-1] - min(known) if lower_is_better else max(known) - column[-1]


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _accuracy(prediction: str, answer: str, _prompt: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def _exact_match(prediction: str, answer: str, _prompt: str) -> float:
    return float(prediction.strip() == answer.strip())


def _rouge_l(prediction: str, answer: str, _prompt: str) -> float:
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


def _edit_similarity(prediction: str, answer: str, _prompt: str) -> float:
    from rapidfuzz import fuzz

    return fuzz.ratio(_py150_literals(prediction.strip()), _py150_literals(answer.strip())) / 100.0


def _py150_literals(code: str) -> str:
    """Py150 writes literals as <STR_LIT:text>; TRACE compares what stands inside."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _PY150_LITERAL.sub(r"\1", code)


def _sari(prediction: str, answer: str, prompt: str) -> float:
    return sari(prompt, prediction, [answer])


class _RougeTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_TOKEN.findall(text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_RougeTokenizer())


_SCORES: dict[str, Callable[[str, str, str], float]] = {
    "accuracy": _accuracy,
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "edit_similarity": _edit_similarity,
    "sari": _sari,
}
