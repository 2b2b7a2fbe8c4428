"""What an accountant is told about a release, and what it says."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from carpool.errors import PrivacyError
from carpool.gaussian import LARGEST_SCALE, SMALLEST_SCALE
from carpool.privacy import Regime
from carpool.protocol import GRID_BITS

Method = Literal["prv", "rdp", "pld", "gaussian"]

_METHOD_NAMES: dict[Method, str] = {
    "prv": "PRV (Opacus)",
    "rdp": "RDP (Opacus)",
    "pld": "PLD (dp-accounting)",
    "gaussian": "closed form",
}

_REGIMES: dict[Regime, str] = {
    "poisson": "Poisson-subsampled Gaussian, neighbouring: add or remove one client",
    "participation-cap": (
        "Gaussian, one client in at most the cap's number of releases, no amplification, "
        "neighbouring: what one client adds to the sums becomes zero, its participations stay"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One Gaussian release.

    Attributes:
        noise_multiplier: z: the noise's standard deviation over the largest influence that one
            client has, joint over everything that is released.
        sampling_rate: q: how likely each client is drawn; 1 where nothing is claimed for it.
        num_values: how many integers got noise of their own: what the sampler's error grows with.
        scale: the smallest standard deviation among them, in grid units.

    Raises:
        PrivacyError: a value out of range.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    num_values: int = 0
    scale: int = 1 << GRID_BITS

    def __post_init__(self) -> None:
        """Refuses what no accountant can take."""
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(
                f"noise multiplier: expected a number above 0, got {self.noise_multiplier}. "
                "Without noise no epsilon can be stated."
            )
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(
                f"sampling rate: expected above 0 and at most 1, got {self.sampling_rate}."
            )
        if self.num_values < 0:
            raise PrivacyError(f"number of values: expected at least 0, got {self.num_values}.")
        if not SMALLEST_SCALE <= self.scale <= LARGEST_SCALE:
            raise PrivacyError(
                f"noise scale: expected {SMALLEST_SCALE} to {LARGEST_SCALE} grid units, which "
                f"the sampler takes, got {self.scale}. Choose another noise multiplier."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epsilon:
    """An epsilon with all that it takes to read it.

    Attributes:
        value: an upper bound; the accountant's error and the sampler's slack are in it.
        delta: its delta.
        method: the accountant.
        regime: what may be claimed about who is in a round.
    """

    value: float
    delta: float
    method: Method
    regime: Regime = "poisson"

    def describe(self) -> str:
        """Accountant, mechanism, neighbouring relation and side: what stands beside the value."""
        return f"{_METHOD_NAMES[self.method]}, {_REGIMES[self.regime]}, upper bound"


def rounded_up(epsilon: float, digits: int) -> str:
    """An upper bound in so many decimals: never less than it is."""
    shift = 10**digits
    return f"{math.ceil(epsilon * shift) / shift:.{digits}f}"


class Group(NamedTuple):
    """Releases that cost the same.

    Attributes:
        noise_multiplier: z.
        sampling_rate: q.
        releases: how many.
    """

    noise_multiplier: float
    sampling_rate: float
    releases: int


def grouped(releases: Iterable[Release]) -> list[Group]:
    """Releases of equal z and q together, in an order that does not depend on theirs."""
    counts = Counter((r.noise_multiplier, r.sampling_rate) for r in releases)
    return [Group(z, q, count) for (z, q), count in sorted(counts.items())]


def check_delta(delta: float) -> None:
    """Refuses a delta outside (0, 1).

    Raises:
        PrivacyError: names it.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta: expected above 0 and below 1, got {delta}.")
