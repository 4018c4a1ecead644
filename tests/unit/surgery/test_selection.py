"""From lists and usage to plans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moses.cli import main
from moses.errors import MosesError, SurgeryError
from moses.surgery import selection
from moses.surgery.selection import Facts

FACTS = Facts("here", {"layers.0": 8, "layers.1": 8}, 2, 2, False)


@given(st.lists(st.floats(-1e6, 1e6), min_size=8, max_size=8), st.sampled_from([2, 4, 6, 8]))
def test_the_most_used_of_each_group_stay(scores, to):
    kept = selection.most_used(FACTS, {"layers.0": scores, "layers.1": scores[::-1]}, to)
    for layer, numbers in kept.items():
        assert numbers == sorted(set(numbers)) and len(numbers) == to
        ours = scores if layer == "layers.0" else scores[::-1]
        for group in (range(4), range(4, 8)):
            inside = [e for e in numbers if e in group]
            assert len(inside) == to // 2
            out = [ours[e] for e in group if e not in inside]
            assert not out or max(out) <= min(ours[e] for e in inside)


def test_ties_keep_the_lower_number():
    facts = Facts("here", {"layers.0": 4}, 2, 1, False)
    assert selection.most_used(facts, {"layers.0": [1, 2, 1, 2]}, 3) == {"layers.0": [0, 1, 3]}


def test_growth_and_merging_stay_within_groups():
    slots = selection.grown(FACTS, 2).layers[0].slots
    assert [str(slot) for slot in slots] == ["0", "1", "2", "3", "+(0)", "4", "5", "6", "7", "+(4)"]
    merged = selection.merged([FACTS, FACTS]).layers[0].slots
    assert [slot.sources[0] for slot in merged] == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("text", "chosen"), [("0,3,5", [0, 3, 5]), ("0-3,7", [0, 1, 2, 3, 7]), (" 2 , 1 ", [2, 1]), ("4", [4])]
)
def test_choices_as_text(text, chosen):
    assert selection.read_choice(text) == chosen


def test_choices_as_files(tmp_path):
    path = tmp_path / "keep.json"
    path.write_text('{"layers.0": [1]}')
    assert selection.read_choice(str(path)) == {"layers.0": [1]}
    for wrong in ("1", '"x"', "{", "[" * 100_000):
        path.write_text(wrong)
        with pytest.raises(SurgeryError):
            selection.read_choice(str(path))
    with pytest.raises(FileNotFoundError):
        selection.read_choice("no/such/file")
    with pytest.raises(SurgeryError):
        selection.read_choice("0-99999999")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: selection.keep(FACTS, [8]), "unknown_expert"),
        (lambda: selection.keep(FACTS, [True]), "unknown_expert"),
        (lambda: selection.keep(FACTS, [1, 1]), "bad_choice"),
        (lambda: selection.keep(FACTS, {"layers.9": [1]}), "unknown_layer"),
        (lambda: selection.keep(FACTS, {"layers.0": "1"}), "bad_choice"),
        (lambda: selection.keep(FACTS, []), "no_expert_left"),
        (lambda: selection.most_used(FACTS, {"layers.0": [1] * 8}, 2), "bad_usage"),
        (lambda: selection.most_used(FACTS, {"layers.0": [float("nan")] * 8}, 2), "bad_usage"),
        (lambda: selection.most_used(FACTS, {}, 3), "groups_misfit"),
        (lambda: selection.most_used(FACTS, {}, 0), "bad_choice"),
        (lambda: selection.grown(FACTS, 3), "groups_misfit"),
        (lambda: selection.grown(FACTS, 2, [0, 1]), "groups_misfit"),
        (lambda: selection.grown(FACTS, 0), "bad_choice"),
        (lambda: selection.extracted(FACTS, {"layers.0": [1]}, dense=False), "bad_choice"),
        (lambda: selection.merged([FACTS, Facts("there", {"layers.0": 8}, 2, 2, False)]), "plans_differ"),
    ],
)
def test_what_does_not_fit_is_refused(make, code):
    with pytest.raises(MosesError) as caught:
        make()
    assert caught.value.code == code


def test_the_command_line_says_what_it_would_do_and_what_it_did(checkpoints, tmp_path, capsys):
    source = str(checkpoints("mixtral", "fused"))
    assert main(["prune", source, "--keep", "0,2", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "nothing was written" in told and "model.layers.1" in told and "cut" in told
    assert list(tmp_path.iterdir()) == []
    assert main(["grow", source, "--add", "1", "--from", "2", "--out", str(tmp_path / "out")]) == 0
    assert "outputs change" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "experts, 2 a token" in capsys.readouterr().out
    for wrong in (
        ["prune", source, "--out", "x"],
        ["prune", source, "--keep", "0", "--usage", "magnitude", "--to", "2", "--out", "x"],
        ["prune", source, "--usage", "magnitude", "--out", "x"],
        ["grow", source, "--add", "1"],
        ["grow", source, "--add", "1", "--in-place", "--out", "x"],
        ["merge", source, "--out", "x"],
        ["convert", source, "--layout", "other", "--out", "x"],
        ["upcycle", source, "--link", "--out", "x"],
    ):
        assert main(wrong) == 2, wrong
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["grow", str(tmp_path), "--add", "1", "--out", "x"]) == 2
    assert "not a valid manifest" in capsys.readouterr().err
