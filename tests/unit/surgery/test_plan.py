"""A surgery plan is checked when it is made, reads back as it was written, and two of them in turn are the one that joins them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moses.errors import FormatError, SurgeryError
from moses.surgery import LayerSurgery, Slot, SurgeryPlan
from moses.surgery.plan import keep

L = "model.layers.0"


def slots(before: int) -> st.SearchStrategy[tuple[Slot, ...]]:
    kept = st.lists(st.integers(0, before - 1), unique=True, max_size=before).map(lambda ids: [Slot((i,)) for i in ids])
    sources = st.lists(st.integers(0, before - 1), unique=True, min_size=2, max_size=min(3, before))
    copies = st.integers(0, before - 1).map(lambda i: Slot((i,), new=True))
    means = sources.map(lambda ids: Slot(tuple(ids), (1 / len(ids),) * len(ids))) if before > 1 else copies
    return st.tuples(kept, st.lists(st.one_of(copies, means), max_size=3)).map(lambda p: (*p[0], *p[1])).filter(bool)


def run(part: LayerSurgery, values: list[float]) -> list[float]:
    """The experts after surgery, where an expert is a number."""
    return [
        sum(values[s] * w for s, w in zip(slot.sources, slot.weights or (1.0,), strict=True)) for slot in part.slots
    ]


@given(st.data(), st.integers(1, 6))
def test_two_plans_in_turn_are_the_plan_that_joins_them(data: st.DataObject, before: int) -> None:
    first = LayerSurgery(L, before, data.draw(slots(before)))
    second = LayerSurgery(L, len(first.slots), data.draw(slots(len(first.slots))))
    both = SurgeryPlan((first,)).then(SurgeryPlan((second,)))[L]
    values = [float(3**index) for index in range(before)]
    assert run(both, values) == pytest.approx(run(second, run(first, values)))
    assert [slot.new for slot in both.slots if slot.kept] == [False] * sum(slot.kept for slot in both.slots)
    assert SurgeryPlan.from_json(SurgeryPlan((both,), top_k=1).to_json()) == SurgeryPlan((both,), top_k=1)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: LayerSurgery(L, 4, ()), "no_expert_left"),
        (lambda: LayerSurgery(L, 4, (Slot((4,)),)), "unknown_expert"),
        (lambda: LayerSurgery(L, 4, (Slot((1,)), Slot((1,)))), "bad_plan"),
        (lambda: LayerSurgery(L, 4, (Slot((1,)), Slot((2,))), dense=True), "bad_plan"),
        (lambda: LayerSurgery("", 4, (Slot((1,)),)), "bad_plan"),
        (lambda: LayerSurgery(L, 0, (Slot(new=True),)), "bad_plan"),
        (lambda: Slot(), "bad_plan"),
        (lambda: Slot((1,), noise=0.1), "bad_plan"),
        (lambda: Slot((1,), new=True, noise=float("nan")), "bad_plan"),
        (lambda: Slot((1, 2)), "bad_plan"),
        (lambda: Slot((1, 2), (0.5, float("inf"))), "bad_plan"),
        (lambda: Slot((1, 1), (0.5, 0.5)), "bad_plan"),
        (lambda: Slot((-1,)), "bad_plan"),
        (lambda: keep({L: 4}, {L: [0]}, top_k=2), "top_k_too_large"),
        (lambda: SurgeryPlan((LayerSurgery(L, 1, (Slot((0,)),)),) * 2), "bad_plan"),
        (lambda: SurgeryPlan((), new_rows="zero"), "bad_plan"),
        (lambda: SurgeryPlan((), seed=-1), "bad_plan"),
        (lambda: keep({L: 4}, {L: [0, 1]}).then(keep({L: 3}, {L: [0]})), "plans_differ"),
    ],
)
def test_what_cannot_be_is_refused(make, code: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        make()
    assert caught.value.code == code


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "layers": [3]}', "[" * 9999]
)
def test_what_is_no_plan_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        SurgeryPlan.from_json(text)


def test_a_plan_says_what_it_does() -> None:
    plan = SurgeryPlan(
        (
            LayerSurgery(
                L, 3, (Slot((2,)), Slot((0,), new=True, noise=0.01), Slot(new=True), Slot((0, 1), (0.25, 0.75)))
            ),
            LayerSurgery("model.layers.1", 3, (Slot((1,)),), dense=True),
        ),
    )
    assert str(plan) == ("model.layers.0  3 -> 4: 2 +(0 ~0.01) fresh (0.25*0 + 0.75*1)\nmodel.layers.1  3 -> dense: 1")
    assert not plan[L].unchanged and keep({L: 2}, {L: [0, 1]})[L].unchanged
