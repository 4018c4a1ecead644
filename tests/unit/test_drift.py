"""The drift detector on made features and losses: when a change is found and where it began, and how that is scored."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moses.errors import ConfigError
from moses.stream.drift import DriftConfig, DriftDetector, recognise, score_changes
from moses.stream.drift.detector import _began
from moses.stream.drift.signals import Novelty, Surprise
from moses.stream.identify import IdentifierConfig, TaskIdentifier

D = 24


def domain(seed, count, noise=1.0):
    """(count, 2, D) features about a point of the domain's own."""
    point = np.random.RandomState(seed).standard_normal((2, D))
    return point + noise * np.random.RandomState(1000 + seed).standard_normal((count, 2, D))


def config(**more):
    return DriftConfig(**{"num_features": 40, **more})


def read(features, losses=None, **more):
    """How many sequences were read when a change was found, the detector, or None."""
    detector = DriftDetector(config(**more))
    for place, row in enumerate(features):
        if detector.update(row, None if losses is None else losses[place]):
            return place + 1, detector
    return None, detector


@pytest.mark.parametrize("seed", range(4))
def test_a_change_of_domain_is_found_soon_and_located(seed):
    x = np.concatenate([domain(seed, 70), domain(seed + 50, 40)])
    found, detector = read(x)
    assert 70 < found <= 90 and detector.signal == "novelty"
    assert abs(detector.change - 70) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_no_change_is_found_where_there_is_none(seed):
    losses = np.random.RandomState(seed).gamma(4.0, 0.5, 600)
    assert read(domain(seed, 600), losses.tolist())[0] is None


def test_a_change_that_features_do_not_show_is_found_in_the_loss():
    losses = [*np.random.RandomState(0).normal(2.0, 0.2, 80), *np.random.RandomState(1).normal(3.0, 0.2, 40)]
    found, detector = read(domain(0, 120), losses)
    assert 80 < found <= 100 and detector.signal == "loss" and abs(detector.change - 80) <= 2
    assert read(domain(0, 120), losses, loss_threshold=None)[0] is None


def test_a_loss_that_falls_while_it_is_learned_is_no_change():
    losses = 3.0 * np.exp(-np.arange(200) / 60) + np.random.RandomState(0).normal(1.0, 0.1, 200)
    assert read(domain(3, 200), losses.tolist())[0] is None


def test_adwin_finds_a_change_too():
    x = np.concatenate([domain(0, 70), domain(50, 60)])
    found, _ = read(x, test="adwin")
    assert 70 < found <= 130


def test_a_dismissed_change_becomes_usual():
    x = np.concatenate([domain(0, 60), domain(50, 200)])
    detector = DriftDetector(config())
    alarms = 0
    for row in x:
        if detector.update(row):
            alarms += 1
            detector.dismiss()
            assert detector.change is None
    assert 1 <= alarms <= 3


def test_nothing_is_looked_for_in_the_reference():
    x = np.concatenate([domain(0, 10), domain(50, 22)])
    assert read(x)[0] is None and len(read(x)[1]) == 32


def test_signals_are_deviations_from_the_reference():
    x = domain(0, 64)
    novelty = Novelty(x, 40)
    assert abs(novelty.reference.mean()) < 1e-9 and abs(novelty.reference.std() - 1) < 1e-9
    assert novelty(domain(77, 20)).mean() > 3 > abs(novelty(domain(0, 200)[64:]).mean())
    surprise = Surprise([1.0, 3.0])
    np.testing.assert_allclose(surprise([1.0, 2.0, 5.0]), [-1, 0, 3])
    assert Surprise([2.0, 2.0])([2.01])[0] == pytest.approx(1.0)  # equal losses have a least spread


@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_a_clear_step_is_located_exactly(before, after, seed):
    noise = np.random.RandomState(seed).uniform(-0.3, 0.3, before + after)
    values = noise + np.repeat([0.0, 4.0], [before, after])
    assert _began(values.tolist()) == before


def test_a_domain_that_returns_is_recognised_and_a_new_one_is_not():
    identifier = TaskIdentifier(IdentifierConfig(num_features=40), D)
    assert recognise(identifier, domain(0, 8), config()) is None
    for task in range(3):
        identifier.add_task(task, domain(task, 150)[:60])
    for task in range(3):
        assert recognise(identifier, domain(task, 150)[100:116], config()) == task
    assert recognise(identifier, domain(9, 16), config()) is None
    mixed = np.concatenate([domain(0, 150)[100:108], domain(1, 150)[100:108]])
    assert recognise(identifier, mixed, config()) is None  # no more than half are of one


VISITS = [("a", 50), ("b", 50), ("a", 50)]


def test_a_perfect_score():
    score = score_changes(VISITS, [54, 110], [(0, "s1"), (50, "s2"), (100, "s1")])
    assert score.boundaries == (50, 100) and score.found == (4, 10) and score.longest_delay == 10
    assert (score.false_alarms, score.returns, score.new) == (0, (True,), (True, True))


def test_false_alarms_missed_changes_and_domains_that_are_not_known_again():
    score = score_changes(VISITS, [20, 60, 70], [(0, "s1"), (20, "s2"), (50, "s3"), (65, "s4")])
    assert score.found == (10, None) and score.false_alarms == 2 and score.longest_delay is None
    assert score.returns == (False,)
    assert score_changes([("a", 50)], [], [(0, "s1")]).longest_delay == 0
    # a second domain that went on as the first one's task
    assert score_changes(VISITS[:2], [], [(0, "s1")]).new == (True, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test", "guess"),
        ("reference", 7),
        ("reference", 8.0),
        ("opening", 0),
        ("slack", 0),
        ("threshold", float("nan")),
        ("loss_threshold", -1),
        ("significance", 1.0),
        ("share", True),
        ("familiar", float("inf")),
    ],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ConfigError, match=f"drift.{field} is"):
        DriftConfig(**{field: value})


def test_river_is_imported_when_a_test_is_made():
    code = "import moses.stream.drift, moses.online.config, sys; assert 'river' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
