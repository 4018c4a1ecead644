"""Masks against numpy, over whole containers of 65,536 units, their borders, and noise."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moses._core import Mask
from moses.errors import FormatError

BORDERS = [0, 1, 8, 65_535, 65_536, 65_537, 131_072, 196_608, 200_000]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    length = draw(st.sampled_from(BORDERS) | st.integers(0, 200_000))
    position = st.sampled_from(BORDERS) | st.integers(0, 200_000)

    def selected() -> np.ndarray:
        flags = np.zeros(length, bool)
        for start, stop, step in draw(st.lists(st.tuples(position, position, st.integers(1, 9)), max_size=4)):
            flags[start:stop:step] ^= True
        density = draw(st.sampled_from([0, 0, 0.001, 0.3]))
        return flags | (np.random.default_rng(draw(st.integers(0, 9))).random(length) < density)

    return selected(), selected()


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_masks_do_what_numpy_does(pair: tuple[np.ndarray, np.ndarray]) -> None:
    left, right = pair
    one, two = Mask.from_bool(left), Mask.from_bool(right)
    assert np.frombuffer(one.to_indices(), "<u8").tolist() == np.flatnonzero(left).tolist()
    assert one == Mask.from_indices(left.size, np.flatnonzero(left))
    assert (one.count, one.length) == (left.sum(), left.size)
    assert (one == two) == bool((left == right).all())
    for mask, wanted in [(one | two, left | right), (one & two, left & right), (one - two, left & ~right)]:
        expected = Mask.from_bool(wanted)
        assert (np.frombuffer(mask.to_bool(), bool) == wanted).all()
        assert mask == expected
        assert hash(mask) == hash(expected)
        assert mask.to_bytes() == expected.to_bytes(), "equal masks have equal bytes, however they were made"
        assert Mask.from_bytes(mask.to_bytes()) == mask
        assert mask.nbytes == len(mask.to_bytes()) <= left.size // 8 + 16
    assert one - two | one & two == one
    assert (one | two) - two == one - two


@settings(max_examples=200, deadline=None)
@given(pairs(), st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_is_found_or_gives_another_whole_mask(
    pair: tuple[np.ndarray, np.ndarray], position: int, bit: int
) -> None:
    data = bytearray(Mask.from_bool(pair[0]).to_bytes())
    data[position % len(data)] ^= 1 << bit
    try:
        mask = Mask.from_bytes(data)
    except FormatError:
        return
    assert np.frombuffer(mask.to_indices(), "<u8").size == mask.count
    assert mask.count <= mask.length
    assert Mask.from_bytes(mask.to_bytes()) == mask
