"""Seeds that depend on names alone, never on the order of calls or on a global generator."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A seed of 63 bits from `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
