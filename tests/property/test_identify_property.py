"""What must hold of the task identifier whatever the tasks: joint equals incremental, no order, no trace of what was
removed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moses.stream.identify import IdentifierConfig, TaskIdentifier, prompt_views, without_template
from moses.stream.identify.lift import RandomFeatures

DIM = 6
CONFIG = IdentifierConfig(num_features=16, ridge=1.0)


@st.composite
def streams(draw, min_tasks: int = 1):
    """Tasks of a few to many prompts, some of them alike, with ids in any order."""
    seed = draw(st.integers(0, 2**31))
    ids = draw(st.lists(st.integers(0, 1000), min_size=min_tasks, max_size=6, unique=True))
    random = np.random.default_rng(seed)
    tasks = {}
    for task_id in ids:
        rows = draw(st.integers(1, 40))
        scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
        tasks[task_id] = scale * (
            random.standard_normal((2, DIM))
            + draw(st.sampled_from([0.0, 0.5, 2.0])) * random.standard_normal((rows, 2, DIM))
        )
    return tasks


def build(tasks, order=None, config=CONFIG):
    identifier = TaskIdentifier(config, DIM)
    for task_id in order or tasks:
        identifier.add_task(task_id, tasks[task_id])
    return identifier


def queries(tasks):
    return np.concatenate([*tasks.values(), np.random.default_rng(0).standard_normal((8, 2, DIM))])


def same(one, other):
    assert one.tasks == other.tasks
    for field in ("task_ids", "probabilities", "novelty", "unknown"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field


def share(tasks):
    """The ridge of the mean over tasks."""
    return np.mean([max(CONFIG.ridge / len(features), 1e-3) for features in tasks.values()])


def joint_scores(tasks, x, ridge):
    """One least-squares problem over all rows of all tasks, each task with the same weight, the ridge as rows of its
    own."""
    lift = RandomFeatures(2, DIM, CONFIG.num_features, CONFIG.seed)
    rows, targets = [], []
    for column, task_id in enumerate(sorted(tasks)):
        weight = 1 / np.sqrt(len(tasks) * len(tasks[task_id]))
        rows.append(lift(tasks[task_id]) * weight)
        targets.append(np.eye(len(tasks))[[column] * len(tasks[task_id])] * weight)
    rows.append(np.sqrt(ridge) * np.eye(CONFIG.num_features))
    targets.append(np.zeros((CONFIG.num_features, len(tasks))))
    return lift(x) @ np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]


def scores_of(identifier, x):
    """Scores up to a constant a row, from the probabilities."""
    log = np.log(identifier.predict(x).probabilities) / 10.0
    return log - log.mean(axis=1, keepdims=True)


@given(streams())
@settings(deadline=None, max_examples=60)
def test_the_incremental_solution_is_the_joint_one(tasks):
    x = queries(tasks)
    joint = joint_scores(tasks, x, share(tasks))
    centred = joint - joint.mean(axis=1, keepdims=True)
    assert np.allclose(scores_of(build(tasks), x), centred, atol=1e-3)  # correlations are kept in 16 bits


def test_a_ridge_added_at_every_step_would_be_seen():
    # the mistake: (Σ (G_t + λI))⁻¹, whose answer depends on how many steps there were
    random = np.random.default_rng(0)
    tasks = {
        task_id: random.standard_normal((2, DIM)) + 0.5 * random.standard_normal((20, 2, DIM)) for task_id in range(5)
    }
    x = queries(tasks)
    wrong = joint_scores(tasks, x, share(tasks) * len(tasks))
    assert not np.allclose(scores_of(build(tasks), x), wrong - wrong.mean(axis=1, keepdims=True), atol=1e-2)


@pytest.mark.parametrize("kind", ["ridge", "cosine"])
@given(tasks=streams(), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_order_of_tasks_leaves_no_trace(kind, tasks, data):
    config = dataclasses.replace(CONFIG, kind=kind)
    order = data.draw(st.permutations(list(tasks)))
    same(build(tasks, config=config).predict(queries(tasks)), build(tasks, order, config).predict(queries(tasks)))


@pytest.mark.parametrize("kind", ["ridge", "cosine"])
@given(tasks=streams(min_tasks=2), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_removed_task_leaves_no_trace(kind, tasks, data):
    config = dataclasses.replace(CONFIG, kind=kind)
    gone = data.draw(st.sampled_from(list(tasks)))
    identifier = build(tasks, config=config)
    x = queries(tasks)
    whole = identifier.predict(x)
    identifier.remove_task(gone)
    rest = {task_id: task for task_id, task in tasks.items() if task_id != gone}
    same(identifier.predict(x), build(rest, config=config).predict(x))
    identifier.add_task(gone, tasks[gone])
    same(identifier.predict(x), whole)


@given(streams(min_tasks=2))
@settings(deadline=None, max_examples=30)
def test_adding_a_task_leaves_the_others_states_alone(tasks):
    *old, last = tasks
    identifier = build(tasks, old)
    before = {task_id: identifier.task_state(task_id) for task_id in old}
    identifier.add_task(last, tasks[last])
    for task_id in old:
        for name, array in identifier.task_state(task_id).items():
            assert np.array_equal(array, before[task_id][name]), name


@pytest.mark.parametrize("kind", ["ridge", "cosine"])
@given(tasks=streams())
@settings(deadline=None, max_examples=30)
def test_a_stored_state_answers_the_same(kind, tasks):
    config = dataclasses.replace(CONFIG, kind=kind)
    identifier = build(tasks, config=config)
    loaded = TaskIdentifier(config, DIM)
    for task_id in sorted(tasks, reverse=True):
        loaded.load_task_state(task_id, identifier.task_state(task_id))
    same(loaded.predict(queries(tasks)), identifier.predict(queries(tasks)))


@given(streams(), st.data())
@settings(deadline=None, max_examples=30)
def test_the_order_of_prompts_matters_to_rounding_only(tasks, data):
    task_id = data.draw(st.sampled_from(list(tasks)))
    shuffled = tasks | {task_id: tasks[task_id][data.draw(st.permutations(range(len(tasks[task_id]))))]}
    x = queries(tasks)
    one, other = build(tasks).predict(x), build(shuffled, list(tasks)).predict(x)
    assert np.allclose(one.probabilities, other.probabilities, atol=1e-4)


@given(st.lists(st.text(alphabet="ab\n ", max_size=12).filter(str.strip), max_size=8))
@settings(deadline=None)
def test_views_are_never_empty_and_say_whose_they_are(prompts):
    texts, ids = prompt_views(prompts)
    assert len(texts) == len(ids)
    assert texts[: len(prompts)] == prompts
    assert all(text.strip() for text in texts)
    assert ids[: len(prompts)] == list(range(len(prompts)))
    for text, prompt_id in zip(texts, ids, strict=True):
        assert set(text.split()) <= set(prompts[prompt_id].split())
    assert len(without_template(prompts)) == len(prompts)
