"""Scores against values worked out by hand or published, and the measures of continual learning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moses.errors import RunError, StreamError
from moses.metrics import normalise, score, score_items, transfer_metrics
from moses.sari import sari, tokenize
from moses.stream.task import ANSWER_METRICS


def one(metric: str, prediction: str, answer: str, prompt: str = "p") -> float:
    (item,) = score_items(metric, [prediction], [answer], [prompt])
    return item


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Business", "Business", True),
        ("  business.\n", "Business", True),
        ("**Business**", "Business", True),
        ('"very  positive"', "very positive", True),
        ("\n\nA\nBecause of the law.", "A", True),  # ScienceQA: the letter, then the reasons
        ("(B)", "B", True),
        ("“鹰派”。", "鹰派", True),
        ("STRASSE", "straße", True),
        ("A", "A\nBecause", True),
        ("Business news", "Business", False),
        ("offensive", "not-offensive", False),
        ("The answer is: Business", "Business", False),
        ("-5", "5", False),
        ("50%", "50", False),
        ("3.5", "35", False),
        ("...", "?", False),
        ("...", "...", True),
    ],
)
def test_accuracy(prediction: str, answer: str, right: bool) -> None:
    assert one("accuracy", prediction, answer) == 100.0 * right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [(" 12\n", "12", True), ("12.", "12", False), ("A", "a", False), ("12\n13", "12", False)],
)
def test_exact_match(prediction: str, answer: str, right: bool) -> None:
    assert one("exact_match", prediction, answer) == 100.0 * right


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat on the mat" (5) of 6 words in each: F1 5/6
    assert one("rouge_l", "the cat sat on the mat", "The cat is on the mat.") == pytest.approx(100 * 5 / 6)
    # order counts: "b" or "a" only, of 2 and 3 words: P 1/2, R 1/3
    assert one("rouge_l", "b a", "a c b") == pytest.approx(100 * 2 / 5)
    assert one("rouge_l", "x", "y") == 0.0


@given(st.text(st.characters(max_codepoint=127), max_size=60), st.text(st.characters(max_codepoint=127), max_size=60))
def test_rouge_l_is_rouge_score_on_ascii(prediction: str, answer: str) -> None:
    from rouge_score import rouge_scorer

    if prediction.strip() and answer.strip():
        expected = rouge_scorer.RougeScorer(["rougeL"]).score(answer, prediction)["rougeL"].fmeasure
        assert one("rouge_l", prediction, answer) == pytest.approx(100 * expected)


def test_rouge_l_reads_other_scripts() -> None:
    assert one("rouge_l", "Über Zürich", "über Zürich.") == pytest.approx(100.0)
    assert one("rouge_l", "会议通过", "会议 通过") == pytest.approx(100.0)
    assert one("rouge_l", "会议通过", "会议否决") == pytest.approx(50.0)


def test_edit_similarity_by_hand() -> None:
    # insertions and deletions only: kitten -> sitting costs 5 of 13 characters
    assert one("edit_similarity", "kitten", "sitting") == pytest.approx(100 * (1 - 5 / 13))
    assert one("edit_similarity", " return x\n", "return x") == 100.0
    assert one("edit_similarity", "abc", "xyz") == 0.0


def test_edit_similarity_compares_py150s_literals() -> None:
    # as TRACE: a literal stands for what is in it, a bare one for nothing or 0
    assert one("edit_similarity", "x = <STR_LIT:utf-8>", "x = utf-8") == 100.0
    assert one("edit_similarity", "x = <NUM_LIT>", "x = 0") == 100.0
    assert one("edit_similarity", "f(<STR_LIT>, <NUM_LIT:1>)", "f(, 1)") == 100.0


SOURCE = "About 95 species are currently accepted."
REFERENCES = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]


def test_sari_as_published() -> None:
    # the example of Hugging Face's metric card for `sari`, and that of `wiki_split` (one reference)
    assert 100 * sari(SOURCE, "About 95 you now get in.", REFERENCES) == pytest.approx(26.953601953601954, abs=1e-9)
    assert one("sari", "About 95 you now get in.", REFERENCES[0], SOURCE) == pytest.approx(21.805555555555557, abs=1e-9)


def test_sari_by_hand() -> None:
    # one word each way, order 1: "a" kept rightly (1 of 1, 1 of 1), "b" deleted rightly, "c" added rightly: 1;
    # order 2: "a b" deleted rightly, "a c" added rightly, nothing to keep (0/0 = 1): 1; orders 3 and 4: all 0/0
    assert sari("a b", "a c", ["a c"]) == 1.0
    # "a" kept rightly of "a b": P 1/2, R 1, F1 2/3; none deleted: 1; nothing added, "c" should be: P 1, R 0, F1 0.
    # order 2: "a b" kept wrongly: P 0, R 1 (0/0), F1 0; none deleted: 1; "a c" not added: 0. Orders 3, 4: 1.
    assert sari("a b", "a b", ["a c"]) == pytest.approx((5 / 9 + 1 / 3 + 1 + 1) / 4)


def test_sari_needs_the_prompt() -> None:
    assert one("sari", "a c", "a c", "a b") != one("sari", "a c", "a d", "a b")
    assert one("sari", "a b", "a c", "a b") < one("sari", "a c", "a c", "a b")


def test_sari_tokenizes_as_13a() -> None:
    assert tokenize("Don't pay $1,000.50 (e.g. 3-4)&amp;x.") == [
        "don't", "pay", "$", "1,000.50", "(", "e", ".", "g", ".", "3", "-", "4", ")", "&", "x", ".",
    ]  # fmt: skip


@pytest.mark.parametrize("metric", ANSWER_METRICS)
def test_every_metric_knows_best_and_nothing(metric: str) -> None:
    answer = "the same few words here"
    assert one(metric, answer, answer, "other text altogether, quite long") == pytest.approx(100.0)
    for empty in ("", " \n"):
        assert one(metric, empty, answer) == 0.0
        assert one(metric, answer, empty) == 0.0
        assert one(metric, empty, empty) == 0.0  # SARI would give 100, a ratio of nothing 100


@pytest.mark.parametrize("metric", ANSWER_METRICS)
@given(data=st.data())
def test_the_score_is_the_mean_of_items_within_bounds(metric: str, data: st.DataObject) -> None:
    texts = st.text("ab .\n<", max_size=12)
    rows = data.draw(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5))
    predictions, answers, prompts = (list(column) for column in zip(*rows, strict=True))
    items = score_items(metric, predictions, answers, prompts)
    assert all(0.0 <= item <= 100.0 + 1e-9 for item in items)
    assert score(metric, predictions, answers, prompts) == pytest.approx(math.fsum(items) / len(items))


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert "\n" not in once
    assert bool(once) == bool(text.strip())


def test_wrong_calls() -> None:
    with pytest.raises(StreamError, match="unknown metric 'bleu': use one of accuracy") as caught:
        score("bleu", ["a"], ["a"], ["p"])
    assert caught.value.code == "unknown_metric"
    with pytest.raises(RunError, match="2 predictions, 1 answers, 1 prompts"):
        score("accuracy", ["a", "b"], ["a"], ["p"])
    with pytest.raises(RunError, match="nothing to score"):
        score("accuracy", [], [], [])


# rows: after task 1, 2, 3; columns: tasks
MATRIX = [
    [80.0, 20.0, 10.0],
    [70.0, 60.0, 30.0],
    [75.0, 40.0, 90.0],
]
BASE = [10.0, 15.0, 5.0]


def test_transfer_metrics_by_hand() -> None:
    metrics = transfer_metrics(MATRIX, BASE)
    assert metrics == {
        "op": pytest.approx((75 + 40 + 90) / 3),
        "avg": pytest.approx((80 + (70 + 60) / 2 + (75 + 40 + 90) / 3) / 3),
        "bwt": pytest.approx(((75 - 80) + (40 - 60)) / 2),
        "fwt": pytest.approx(((20 - 15) + (30 - 5)) / 2),
        "forgetting": pytest.approx(((80 - 75) + (60 - 40)) / 2),
    }


def test_forgetting_starts_when_a_task_is_learned() -> None:
    # task 2 was better before it was trained than after: that is no forgetting, nothing was lost since
    matrix = [[50.0, 99.0, 0.0], [50.0, 60.0, 0.0], [50.0, 60.0, 5.0]]
    assert transfer_metrics(matrix, [0.0, 0.0, 0.0])["forgetting"] == 0.0
    # task 1 got better later, then worse: forgetting is from the best
    matrix = [[50.0, 0.0, 0.0], [70.0, 10.0, 0.0], [60.0, 10.0, 5.0]]
    metrics = transfer_metrics(matrix, [0.0, 0.0, 0.0])
    assert metrics["forgetting"] == pytest.approx((10 + 0) / 2)
    assert metrics["bwt"] == pytest.approx((10 + 0) / 2)


def test_equal_columns_give_exact_zeros() -> None:
    matrix = [[1 / 3, 0.1], [1 / 3, 0.7]]
    metrics = transfer_metrics(matrix, [0.3, 0.1])
    assert metrics["bwt"] == 0.0
    assert metrics["forgetting"] == 0.0
    assert metrics["fwt"] == 0.0


def test_heads_per_task_have_no_forward_transfer() -> None:
    matrix = [[80.0, None, None], [70.0, 60.0, None], [75.0, 40.0, 90.0]]
    metrics = transfer_metrics(matrix, [None, None, None])
    assert metrics == transfer_metrics(MATRIX, BASE) | {"fwt": None}


def test_one_task() -> None:
    assert transfer_metrics([[42.0]], [7.0]) == {"op": 42.0, "avg": 42.0, "bwt": None, "fwt": None, "forgetting": None}


def test_a_missing_cell_that_is_needed_gives_none() -> None:
    metrics = transfer_metrics([[80.0, 1.0], [None, 60.0]], [0.0, 0.0])
    assert metrics == {"op": None, "avg": None, "bwt": None, "fwt": 1.0, "forgetting": None}


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]])
def test_a_matrix_that_is_not_square_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(RunError, match="for 2 tasks: give T rows of T") as caught:
        transfer_metrics(matrix, [0.0, 0.0])
    assert caught.value.code == "bad_matrix"
