"""The settings of a run without task boundaries. Immutable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import as_tuple, check_int, from_settings
from ..errors import ConfigError
from ..stream.drift import DriftConfig


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """How a stream is read and cut into segments.

    Attributes:
        visits: the domains in the order in which their sequences come; one that comes again goes on where it left off.
        horizon: sequences that a segment is expected to have, for a method's own schedule and the learning rate's warm-up.
        drift: of the detector.
    """

    visits: tuple[str, ...]
    horizon: int = 128
    drift: DriftConfig = field(default_factory=DriftConfig)

    def __post_init__(self) -> None:
        as_tuple(self, "visits")
        check_int(self, "horizon", 1)
        if isinstance(self.drift, dict):
            object.__setattr__(self, "drift", from_settings(DriftConfig, self.drift))


def online_config(visits: Sequence[str], settings: dict[str, Any]) -> tuple[OnlineConfig, dict[str, Any]]:
    """The online settings among flat `settings` (`horizon` and `drift.FIELD`), and the other ones, with one epoch.

    Raises:
        ConfigError: a value is wrong, or `epochs` is not 1.
    """
    drift = {key.removeprefix("drift."): value for key, value in settings.items() if key.startswith("drift.")}
    rest = {key: value for key, value in settings.items() if not key.startswith("drift.")}
    horizon = {"horizon": rest.pop("horizon")} if "horizon" in rest else {}
    if rest.setdefault("epochs", 1) != 1:
        raise ConfigError(
            f"epochs is {rest['epochs']!r}: a stream without boundaries is read once; leave epochs out", code="one_pass"
        )
    return OnlineConfig(visits=tuple(visits), drift=from_settings(DriftConfig, drift), **horizon), rest
