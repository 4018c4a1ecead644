"""The ledger against a naive one with sets, step by step; it is validated, saved and loaded after each step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moses._core import Mask, Registry
from moses.errors import RegistryError

SPACES = {"A": (6, 2), "B": (4, 3)}
Unit = tuple[int, str, int]


def units_of(masks: list[tuple[int, str, Mask]]) -> list[Unit]:
    return [(layer, space, unit) for layer, space, mask in masks for unit in indices(mask)]


def indices(mask: Mask) -> list[int]:
    return np.frombuffer(mask.to_indices(), "<u8").tolist()


def value(unit: Unit) -> bytes:
    layer, space, number = unit
    return (layer * 7919 + number * 104_729 + ord(space) * 31).to_bytes(8, "little")[: SPACES[space][1]]


class Ledger(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.experts: list[int] = []
        self.used: dict[int, set[Unit]] = {}
        self.open: int | None = None
        self.begun = 0

    def length(self, layer: int, space: str) -> int:
        return self.experts[layer] * SPACES[space][0]

    def owner(self, unit: Unit) -> int | None:
        return min((task for task, units in self.used.items() if unit in units), default=None)

    @initialize()
    def add_the_first_layer(self) -> None:
        self.add_layer()

    @rule()
    @precondition(lambda self: len(self.experts) < 4)
    def add_layer(self) -> None:
        number = len(self.experts)
        spaces = [(name, *sizes) for name, sizes in SPACES.items()]
        assert self.registry.add_layer(f"layer {number}", 2, spaces) == number
        self.experts.append(2)

    @rule(data=st.data(), count=st.integers(1, 3))
    def add_experts(self, data: st.DataObject, count: int) -> None:
        layer = data.draw(st.integers(0, len(self.experts) - 1))
        added = self.registry.add_experts(layer, count)
        assert len(set(added)) == count
        self.experts[layer] += count

    @rule()
    def begin_task(self) -> None:
        if self.open is not None:
            with pytest.raises(RegistryError, match="still open"):
                self.registry.begin_task("another")
            return
        self.open = self.registry.begin_task(f"task {self.begun}")
        assert self.open == self.begun, "an id is never given twice"
        self.begun += 1

    @rule(data=st.data())
    @precondition(lambda self: self.open is not None)
    def end_task(self, data: st.DataObject) -> None:
        assert self.open is not None
        everything = [
            (layer, space, unit)
            for layer in range(len(self.experts))
            for space in SPACES
            for unit in range(self.length(layer, space))
        ]
        # Prefer units that are in use, so that tasks overlap.
        shared = sorted(set().union(*self.used.values())) or everything
        chosen = data.draw(st.sets(st.sampled_from(shared) | st.sampled_from(everything), max_size=25))
        masks = []
        for layer, space in data.draw(
            st.permutations([(layer, s) for layer in range(len(self.experts)) for s in SPACES])
        ):
            units = [unit for at, name, unit in chosen if (at, name) == (layer, space)]
            if units or data.draw(st.booleans()):
                masks.append((layer, space, Mask.from_indices(self.length(layer, space), units)))
        self.registry.end_task(self.open, masks)
        self.used[self.open] = chosen
        self.open = None

    @rule()
    @precondition(lambda self: self.open is not None)
    def abandon_task(self) -> None:
        assert self.open is not None
        self.registry.abandon_task(self.open)
        self.open = None

    @rule(data=st.data())
    @precondition(lambda self: bool(self.used))
    def forget_task(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.used)))
        freed = units_of(self.registry.forget_task(task))
        units = self.used.pop(task)
        assert freed == sorted(unit for unit in units if self.owner(unit) is None)

    @invariant()
    def the_bytes_bring_it_back(self) -> None:
        self.registry.validate()
        data = self.registry.to_bytes()
        again = Registry.from_bytes(data)
        assert again == self.registry
        assert again.to_bytes() == data
        self.registry = again

    @invariant()
    def who_uses_and_owns_is_as_in_the_model(self) -> None:
        for layer in range(len(self.experts)):
            for space in SPACES:
                every = [(layer, space, unit) for unit in range(self.length(layer, space))]
                counts = [sum(unit in units for units in self.used.values()) for unit in every]
                got = np.frombuffer(self.registry.reference_counts(layer, space), "<u4").tolist()
                assert got == counts
                assert indices(self.registry.used(layer, space)) == [at for at, count in enumerate(counts) if count]
                assert indices(self.registry.free(layer, space)) == [at for at, count in enumerate(counts) if not count]
                for task, units in self.used.items():
                    mine = [unit in units for unit in every]
                    owned = [self.owner(unit) == task for unit in every]
                    exclusive = [mine[at] and counts[at] == 1 for at in range(len(every))]
                    assert indices(self.registry.mask(task, layer, space)) == np.flatnonzero(mine).tolist()
                    assert indices(self.registry.owned(task, layer, space)) == np.flatnonzero(owned).tolist()
                    assert indices(self.registry.exclusive(task, layer, space)) == np.flatnonzero(exclusive).tolist()

    @invariant()
    def bytes_add_up(self) -> None:
        size = lambda units: sum(SPACES[unit[1]][1] for unit in units)  # noqa: E731
        everything = set().union(*self.used.values())
        assert self.registry.used_bytes() == size(everything)
        assert sum(self.registry.new_bytes(task) for task in self.used) == size(everything)
        live = [info.id for info in self.registry.tasks()]
        units = [self.used.get(task, set()) for task in live]
        assert self.registry.overlap() == [[size(left & right) for right in units] for left in units]

    @invariant()
    def values_come_from_their_owners(self) -> None:
        stored = {
            task: b"".join(value(unit) for unit in sorted(units) if self.owner(unit) == task)
            for task, units in self.used.items()
        }
        for task, units in self.used.items():
            assert self.registry.assemble(task, stored) == b"".join(map(value, sorted(units)))


Ledger.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_ledger = Ledger.TestCase
