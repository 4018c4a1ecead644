"""Masks from Python: conversions, algebra, what they refuse."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from moses._core import Mask
from moses.errors import FormatError, RegistryError


def indices(mask: Mask) -> list[int]:
    return np.frombuffer(mask.to_indices(), "<u8").tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32, np.int16, np.uint8])
def test_indices_of_every_integer_type_are_taken(dtype: type) -> None:
    assert indices(Mask.from_indices(100, np.array([99, 0, 7, 7], dtype))) == [0, 7, 99]


@pytest.mark.parametrize("given", [[99, 0, 7, 7], (99, 0, 7), {99, 0, 7}, iter([7, 0, 99])])
def test_indices_of_every_kind_of_iterable_are_taken(given: object) -> None:
    assert indices(Mask.from_indices(100, given)) == [0, 7, 99]


def test_bool_and_indices_agree_with_numpy() -> None:
    selected = np.random.default_rng(0).random(200_001) < 0.3
    mask = Mask.from_bool(selected)
    assert indices(mask) == np.flatnonzero(selected).tolist()
    assert (np.frombuffer(mask.to_bool(), bool) == selected).all()
    assert (mask.length, mask.count, len(mask)) == (selected.size, selected.sum(), selected.size)
    assert mask.density == pytest.approx(selected.mean())
    assert mask == Mask.from_bool(selected.astype(np.uint8) * 200) == Mask.from_bool(selected.tobytes())
    assert mask == Mask.from_bool(selected.reshape(3, -1))


def test_algebra_gives_what_numpy_gives() -> None:
    left, right = (np.random.default_rng(seed).random(70_000) < 0.5 for seed in (1, 2))
    one, two = Mask.from_bool(left), Mask.from_bool(right)
    for mask, wanted in [(one | two, left | right), (one & two, left & right), (one - two, left & ~right)]:
        assert (np.frombuffer(mask.to_bool(), bool) == wanted).all()


def test_empty_and_full() -> None:
    empty, full = Mask.empty(70_000), Mask.full(70_000)
    assert (empty.count, full.count, bool(empty), bool(full)) == (0, 70_000, False, True)
    assert full - full == empty
    assert empty.nbytes <= 6
    assert full.nbytes <= 6
    assert Mask.empty(0).density == 0.0
    assert Mask.full(0) == Mask.empty(0)


def test_membership() -> None:
    mask = Mask.from_indices(10, [3])
    assert 3 in mask
    assert all(index not in mask for index in (2, 10, -1, 2**70))


def test_equality_needs_the_same_length() -> None:
    assert Mask.from_indices(10, [3]) != Mask.from_indices(11, [3])
    assert Mask.from_indices(10, [3]) != "mask"
    assert len({Mask.from_indices(10, [3]), Mask.from_bool(b"\0\0\0\1\0\0\0\0\0\0")}) == 1
    with pytest.raises(TypeError):
        assert Mask.empty(1) < Mask.full(1)


def test_growth_keeps_the_units() -> None:
    mask = Mask.full(10).resized(20)
    assert indices(mask) == list(range(10))
    assert (mask.length, mask.count) == (20, 10)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
def test_copies_are_equal(again) -> None:
    mask = Mask.from_indices(1000, range(0, 1000, 7))
    assert again(mask) == mask


def test_a_mask_cannot_be_changed() -> None:
    mask = Mask.empty(5)
    with pytest.raises(AttributeError):
        mask.length = 6


def test_sizes_on_disk() -> None:
    """The mask of 32 rank components costs bytes; an element mask costs a bit a unit, less where it has structure."""
    rng = np.random.default_rng(0)
    components = sum(Mask.from_bool(rng.random(32) < 0.25).nbytes for _ in range(24))
    assert components < 24 * 9
    length = 1_000_000
    assert Mask.from_bool(rng.random(length) < 0.3).nbytes * 8 < length * 1.01
    assert Mask.from_bool(rng.random(length) < 0.01).nbytes * 8 < length * 0.11
    assert Mask.from_indices(length, range(250_000, 750_000)).nbytes < 16


@pytest.mark.parametrize("length", [-1, 2**65])
def test_lengths_that_are_no_numbers_of_units(length: int) -> None:
    with pytest.raises(OverflowError):
        Mask.empty(length)


def test_negative_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Mask.from_indices(10, np.array([-1]))
    with pytest.raises(OverflowError):
        Mask.from_indices(10, [-1])


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_only_bytes_make_a_bool_mask(dtype: type) -> None:
    with pytest.raises(ValueError, match="bool or uint8"):
        Mask.from_bool(np.zeros(8, dtype))


def test_a_buffer_with_gaps_is_refused() -> None:
    with pytest.raises(BufferError, match="copy"):
        Mask.from_bool(np.zeros(8, bool)[::2])


def test_floats_are_no_indices() -> None:
    with pytest.raises(TypeError):
        Mask.from_indices(10, np.array([1.5]))


def test_unequal_lengths_do_not_combine() -> None:
    for combine in (Mask.__or__, Mask.__and__, Mask.__sub__):
        with pytest.raises(RegistryError, match="10 and 11 units"):
            combine(Mask.empty(10), Mask.empty(11))


def test_damaged_bytes_are_a_format_error() -> None:
    data = Mask.from_indices(1000, [5, 900]).to_bytes()
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            Mask.from_bytes(data[:cut])
    with pytest.raises(FormatError, match="too many"):
        Mask.from_bytes(data + b"\0")
