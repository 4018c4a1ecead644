"""How numbers and names are shown to people: on a terminal, in a page, in a picture. Names may be hostile."""

from __future__ import annotations

NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""


def printable(text: object, limit: int = 200) -> str:
    """One line without control characters, so that no name can steer a terminal; cut at `limit` characters."""
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def format_bytes(count: int | None) -> str:
    """Decimal units, as disks are sold: 0 B, 999 B, 1.5 kB, 12.3 MB."""
    if count is None:
        return NOTHING
    if abs(count) < 1000:
        return f"{count} B"
    size, units = count / 1000, ["kB", "MB", "GB", "TB", "PB", "EB"]
    while abs(size) >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def format_score(score: float | None) -> str:
    """A score or a difference of scores with one decimal; a minus that rounds to zero is no minus."""
    if score is None:
        return NOTHING
    return f"{score + 0.0:.1f}" if abs(score) >= 0.05 else "0.0"


def format_share(share: float | None) -> str:
    """A share from 0 to 1 as per cent with one decimal."""
    return NOTHING if share is None else f"{100 * share:.1f}%"
