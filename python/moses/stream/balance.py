"""Choosing examples evenly over labels, in an order that is the same on every machine and in every Python."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from moses.stream.task import Example


def balanced(by_label: Mapping[str, Sequence[Example]], size: int) -> tuple[Example, ...]:
    """Round after round, the next example of each label, until there are `size` or none is left; their order owes
    nothing to labels."""
    chosen: list[Example] = []
    for rank in range(max(map(len, by_label.values()), default=0)):
        chosen += [by_label[label][rank] for label in sorted(by_label) if len(by_label[label]) > rank]
    return tuple(sorted(chosen[:size], key=lambda example: stable_hash(example.prompt)))


def spread(rows: Sequence[Example], limit: int | None) -> tuple[Example, ...]:
    """At most `limit` rows at even distances, so that a file sorted by answer keeps all of its answers."""
    if limit is None or limit >= len(rows):
        return tuple(rows)
    return tuple(rows[index * len(rows) // limit] for index in range(limit))


def stable_hash(text: str) -> str:
    """SHA-256 hex: it orders examples without a random generator, and a new example does not move the others."""
    return hashlib.sha256(text.encode()).hexdigest()
