"""How much noise training bore where it was tried, and the thresholds taken from that.

ATT&CK, all-MiniLM-L6-v2, eager PyTorch, heads only, 60 rounds, 50 of 801 clients expected,
delta 1e-5, one seed, test clients' acc@1; docs/accounting.md has the table.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

ZERO_SHOT = 0.339
"""acc@1 of the untrained model (nearest document) on the same queries."""


def noise_to_signal(*, noise_multiplier: float, num_values: int, cohort: float) -> float:
    """The noise's norm on a round's mean over the largest norm that the mean can have.

    Noise of z * C per value on the sum has the norm z * C * sqrt(values); the mean divides it by
    the cohort; and updates of C each, all in one direction, have a mean of C. C cancels.
    """
    return noise_multiplier * math.sqrt(num_values) / cohort


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One trained model.

    Attributes:
        head: what was trained.
        num_values: of its theta.
        noise_multiplier: z.
        cohort: whose noise was added.
        accuracy: acc@1 with it.
        without_noise: acc@1 of the same training without.
    """

    head: str
    num_values: int
    noise_multiplier: float
    cohort: int
    accuracy: float
    without_noise: float

    @property
    def noise_to_signal(self) -> float:
        """Of a round."""
        return noise_to_signal(
            noise_multiplier=self.noise_multiplier,
            num_values=self.num_values,
            cohort=self.cohort,
        )

    @property
    def kept(self) -> float:
        """The share of the gain over zero-shot that was left."""
        return (self.accuracy - ZERO_SHOT) / (self.without_noise - ZERO_SHOT)


_EPSILON_8, _EPSILON_2 = 0.693, 1.353

_HEADS = {
    # name: values, acc@1 without noise
    "core64+b": (4_695, 0.614),
    "core128+b": (16_983, 0.653),
    "full+b": (148_055, 0.663),
    "rows": (230_016, 0.668),
}

_ACCURACIES = {
    # (z, cohort): acc@1 by head
    (_EPSILON_8, 50): {"core64+b": 0.528, "core128+b": 0.544, "full+b": 0.539, "rows": 0.509},
    (_EPSILON_2, 50): {"core64+b": 0.499, "core128+b": 0.502, "full+b": 0.495, "rows": 0.463},
    (_EPSILON_2, 1000): {"core64+b": 0.612, "core128+b": 0.637, "full+b": 0.653, "rows": 0.647},
    (_EPSILON_2, 5000): {"core128+b": 0.653, "rows": 0.667},
}

MEASURED = tuple(
    Measured(
        head=head,
        num_values=_HEADS[head][0],
        noise_multiplier=z,
        cohort=cohort,
        accuracy=accuracy,
        without_noise=_HEADS[head][1],
    )
    for (z, cohort), accuracies in _ACCURACIES.items()
    for head, accuracy in accuracies.items()
)


class Band(NamedTuple):
    """A range of noise-to-signal and what it did.

    Attributes:
        name: the verdict.
        up_to: the largest noise-to-signal in it that was measured, rounded up.
        kept_least: the smallest share of the gain that was kept in it.
        kept_most: the largest.
    """

    name: str
    up_to: float
    kept_least: float
    kept_most: float


SENSIBLE = Band("sensible", 0.65, 0.93, 1.00)
COSTLY = Band("costly", 6.7, 0.51, 0.69)
NOT_SENSIBLE = Band("not sensible", math.inf, 0.37, 0.49)

BANDS = (SENSIBLE, COSTLY, NOT_SENSIBLE)
"""In order. The shares are rounded outward to whole per cents."""


def band_of(ratio: float) -> Band:
    """The first band that reaches this far."""
    return next(band for band in BANDS if ratio <= band.up_to)
