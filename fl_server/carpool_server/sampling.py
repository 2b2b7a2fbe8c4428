"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from carpool.errors import ConfigError
from carpool.randomness import happens, words
from carpool.schema import canonical_id

KEY_BYTES = 32


class CohortSampler(Protocol):
    """Draws a round's cohort from the registered population."""

    def draw(self, population: Iterable[str], *, round_number: int) -> tuple[str, ...]:
        """The drawn devices, sorted; equal arguments give the same cohort.

        So a round that is done again after a crash asks the same devices, and neither the
        split over aggregators nor the order of the population changes anything.
        """


class PoissonSampler:
    """Every device is drawn independently, with the same probability, in every round.

    Attributes:
        rate: that probability, up to 2**-64.

    Args:
        rate: in (0, 1].
        key: secret where the draw amplifies privacy; whoever has it knows every cohort.
    """

    def __init__(self, *, rate: float, key: bytes) -> None:
        self.rate = rate
        self._key = key

    def draw(self, population: Iterable[str], *, round_number: int) -> tuple[str, ...]:
        """The drawn devices, sorted; possibly none."""
        return tuple(
            sorted(device for device in population if self._is_drawn(device, round_number))
        )

    def _is_drawn(self, device_id: str, round_number: int) -> bool:
        stream = words(
            purpose="carpool/1/cohort",
            key=self._key,
            device_id=device_id,
            round_number=round_number,
        )
        return happens(self.rate, stream)


def sampling_rate(*, expected_size: float, population: int) -> float:
    """``expected_size / population``.

    Raises:
        ConfigError: more devices expected in a round than there are.
    """
    if expected_size > population:
        raise ConfigError(
            f"cohort.expected_size: expected at most the population of {population} devices, "
            f"got {expected_size:g}. Lower it, or bring more devices."
        )
    return expected_size / population


def derived_key(seed: int, *, purpose: str) -> bytes:
    """A run's reproducible 32-byte key for one purpose: SHA-256 of canonical JSON of both."""
    return bytes.fromhex(canonical_id({"purpose": purpose, "seed": seed}))
