"""The ledger from Python: who uses, owns and frees what, in small cases that can be checked by eye."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest

from moses._core import Mask, Registry
from moses.errors import RegistryError

RANK, D_IN, D_OUT = 2, 3, 2


def rank_registry() -> tuple[Registry, int]:
    """One layer of four experts of rank 2: eight components of 20 bytes each."""
    registry = Registry()
    return registry, registry.add_layer("model.layers.0.q_proj", 4, [("components", RANK, (D_IN + D_OUT) * 4)])


def train(registry: Registry, name: str, layer: int, units: list[int], space: str = "components") -> int:
    task = registry.begin_task(name)
    length = registry.used(layer, space).length
    registry.end_task(task, [(layer, space, Mask.from_indices(length, units))])
    return task


def units(mask: Mask) -> list[int]:
    return np.frombuffer(mask.to_indices(), "<u8").tolist()


def values(marks: list[int], unit_bytes: int = 20) -> bytes:
    return b"".join(bytes([mark]) * unit_bytes for mark in marks)


def test_layers_say_what_they_have() -> None:
    registry, first = rank_registry()
    second = registry.add_layer("mlp", 2, [("A", 6, 2), ("B", 4, 2)])
    infos = registry.layers()
    assert [(info.id, info.name, info.expert_ids) for info in infos] == [
        (first, "model.layers.0.q_proj", [0, 1, 2, 3]),
        (second, "mlp", [4, 5]),
    ]
    assert [(space.name, space.units_per_expert, space.unit_bytes, space.length) for space in infos[1].spaces] == [
        ("A", 6, 2, 12),
        ("B", 4, 2, 8),
    ]
    assert registry.total_bytes() == 8 * 20 + 12 * 2 + 8 * 2


def test_a_unit_belongs_to_the_lowest_live_task_that_uses_it() -> None:
    registry, layer = rank_registry()
    one = train(registry, "one", layer, [0, 1, 2])
    two = train(registry, "two", layer, [2, 3])
    three = train(registry, "three", layer, [2, 3, 4])
    owned = lambda task: units(registry.owned(task, layer, "components"))  # noqa: E731
    exclusive = lambda task: units(registry.exclusive(task, layer, "components"))  # noqa: E731
    assert [owned(task) for task in (one, two, three)] == [[0, 1, 2], [3], [4]]
    assert [exclusive(task) for task in (one, two, three)] == [[0, 1], [], [4]]
    assert [registry.new_bytes(task) for task in (one, two, three)] == [60, 20, 20]
    assert np.frombuffer(registry.reference_counts(layer, "components"), "<u4").tolist() == [1, 1, 3, 2, 1, 0, 0, 0]
    assert units(registry.used(layer, "components")) == [0, 1, 2, 3, 4]
    assert units(registry.free(layer, "components")) == [5, 6, 7]
    assert registry.used_bytes() == 100
    assert registry.bank_fraction() == pytest.approx(100 / 160)
    assert registry.overlap() == [[60, 20, 20], [20, 40, 40], [20, 40, 60]]


def test_forgetting_frees_what_no_other_task_uses_and_hands_the_rest_on() -> None:
    registry, layer = rank_registry()
    one = train(registry, "one", layer, [0, 1, 2])
    two = train(registry, "two", layer, [2, 3])
    [(freed_layer, freed_space, freed)] = registry.forget_task(one)
    assert (freed_layer, freed_space, units(freed)) == (layer, "components", [0, 1])
    assert units(registry.owned(two, layer, "components")) == [2, 3]
    assert units(registry.mask(two, layer, "components")) == [2, 3]
    assert registry.forget_task(two)[0][2] == Mask.from_indices(8, [2, 3])
    assert registry.used_bytes() == 0
    assert registry.forget_task(train(registry, "none", layer, [])) == []


def test_ids_are_never_given_twice() -> None:
    registry, layer = rank_registry()
    one = train(registry, "one", layer, [0])
    registry.forget_task(one)
    two = registry.begin_task("one")
    registry.abandon_task(two)
    registry = Registry.from_bytes(registry.to_bytes())
    assert (one, two, registry.begin_task("one")) == (0, 1, 2)
    assert registry.add_experts(layer, 2) == [4, 5]
    registry.add_layer("other", 1, [("A", 1, 1)])
    assert registry.layers()[1].expert_ids == [6]


def test_growth_keeps_old_masks_valid() -> None:
    registry, layer = rank_registry()
    one = train(registry, "one", layer, [0, 7])
    registry.add_experts(layer, 1)
    assert registry.mask(one, layer, "components") == Mask.from_indices(10, [0, 7])
    assert units(registry.free(layer, "components")) == [1, 2, 3, 4, 5, 6, 8, 9]
    two = train(registry, "two", layer, [9])
    assert registry.new_bytes(two) == 20
    registry.validate()


def test_values_come_from_their_owners_in_canonical_order() -> None:
    registry, layer = rank_registry()
    second = registry.add_layer("mlp", 1, [("A", 4, 2), ("B", 4, 1)])
    one = registry.begin_task("one")
    registry.end_task(
        one,
        [
            (second, "B", Mask.from_indices(4, [3])),
            (second, "A", Mask.from_indices(4, [0, 2])),
            (layer, "components", Mask.from_indices(8, [1, 4])),
        ],
    )
    two = registry.begin_task("two")
    registry.end_task(
        two,
        [(layer, "components", Mask.from_indices(8, [0, 4, 5])), (second, "A", Mask.from_indices(4, [1, 2, 3]))],
    )
    # Layer by layer, space by space, unit by unit; what task 0 owns is not in the file of task 1.
    stored = {
        one: values([1, 4]) + b"AACC" + b"z",
        two: values([0, 5]) + b"BBDD",
    }
    assert registry.assemble(one, {one: stored[one]}) == stored[one]
    assert registry.assemble(two, stored) == values([0, 4, 5]) + b"BBCCDD"
    assert registry.assemble(two, {owner: np.frombuffer(part, np.uint8) for owner, part in stored.items()})
    assert registry.content_hash(two, stored) == registry.content_hash(two, dict(reversed(stored.items())))
    assert registry.content_hash(one, stored) != registry.content_hash(two, stored)


def test_a_task_without_units_has_no_values() -> None:
    registry, layer = rank_registry()
    assert registry.assemble(train(registry, "one", layer, []), {}) == b""


def test_states_and_hashes_of_tasks() -> None:
    registry, layer = rank_registry()
    one = registry.begin_task("one", domain="finance")
    assert [(info.id, info.name, info.domain, info.state) for info in registry.tasks()] == [
        (one, "one", "finance", "open")
    ]
    registry.end_task(one, [(layer, "components", Mask.full(8))])
    registry.set_content_hash(one, "ab" * 32)
    info = registry.task("one")
    assert (info.state, info.content_hash, info.domain) == ("ended", "ab" * 32, "finance")


def test_history_forgets_names() -> None:
    registry, layer = rank_registry()
    registry.forget_task(train(registry, "a customer's name", layer, [1]))
    registry.add_experts(layer, 2)
    assert registry.history() == [
        "layer 0 added with 4 experts",
        "task 0 begun",
        "task 0 ended",
        "task 0 forgotten",
        "2 experts added to layer 0",
    ]
    assert b"customer" not in registry.to_bytes()


def test_the_open_task_uses_nothing_yet() -> None:
    registry, layer = rank_registry()
    task = registry.begin_task("one")
    assert registry.mask(task, layer, "components").count == 0
    assert registry.overlap() == [[0]]
    assert registry.new_bytes(task) == registry.used_bytes() == 0


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_equal_and_apart(again) -> None:
    registry, layer = rank_registry()
    train(registry, "one", layer, [1, 2])
    other = again(registry)
    assert other == registry
    assert other.to_bytes() == registry.to_bytes()
    train(other, "two", layer, [3])
    assert other != registry
    assert len(registry.tasks()) == 1


def test_a_failed_call_changes_nothing() -> None:
    registry, layer = rank_registry()
    task = registry.begin_task("one")
    before = registry.to_bytes()
    for masks in (
        [(layer, "components", Mask.empty(7))],
        [(layer, "A", Mask.empty(8))],
        [(9, "components", Mask.empty(8))],
        [(layer, "components", Mask.empty(8))] * 2,
    ):
        with pytest.raises(RegistryError):
            registry.end_task(task, masks)
        assert registry.to_bytes() == before
    with pytest.raises(RegistryError):
        registry.add_layer("x", 1, [("A", 1, 1), ("A", 1, 1)])
    with pytest.raises(RegistryError):
        registry.begin_task("two")
    assert registry.to_bytes() == before


def test_threads_may_share_it() -> None:
    registry, layer = rank_registry()
    for number in range(8):
        train(registry, str(number), layer, [number])
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(200):
                assert registry.used(layer, "components").count >= 8
                assert registry == registry
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        registry.add_experts(layer, 1)
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []


def test_a_hundred_tasks_of_rank_components_stay_small() -> None:
    registry = Registry()
    layers = [registry.add_layer(f"model.layers.{at}.mlp.up_proj", 4, [("components", 8, 1000)]) for at in range(24)]
    rng = np.random.default_rng(0)
    for number in range(100):
        task = registry.begin_task(f"task-{number}")
        registry.end_task(task, [(layer, "components", Mask.from_bool(rng.random(32) < 0.3)) for layer in layers])
        assert registry.mask_bytes(task) < 24 * 10
    masks = sum(registry.mask_bytes(task.id) for task in registry.tasks())
    assert len(registry.to_bytes()) - masks < 24 * 20 + 100 * 24
