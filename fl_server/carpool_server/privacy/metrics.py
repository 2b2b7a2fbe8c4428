"""Devices' loss, hit@1 and number of examples as coordinates of the noised sum.

Each is clipped to a stated range, moved to [-1/2, 1/2], and added like an update, so that it
has a bound, a noise and a share of the budget. The fourth coordinate is 1/2 for everybody: it
counts the contributors, whom the others are divided by.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carpool.privacy import MetricBounds
from carpool.protocol import GRID_BOUND, METRIC_NAMES
from carpool.schema import Model

_HALF = GRID_BOUND // 2
"""One half, on the grid; four coordinates of at most one half are at most 1 long."""


class RoundMetrics(Model):
    """A round's metrics, as they may be told.

    Attributes:
        contributors: devices in the sum.
        loss: mean of their mean training losses, in nats, each clipped; None where the noise
            is larger than the contributors.
        hit_at_1: mean share of their examples whose document came first before training.
        examples: mean number trained on, clipped.
        noise: standard deviation of ``contributors``; the means' is about this over twice the
            contributors, times their ranges.
    """

    contributors: float
    loss: float | None
    hit_at_1: float | None
    examples: float | None
    noise: float


def encode_metrics(
    *, loss: float, hit_at_1: float, examples: int, bounds: MetricBounds
) -> NDArray[np.int64]:
    """One device's metrics on the grid.

    Guarantees: the L2 norm of the result is at most ``2**GRID_BITS`` whatever comes in; what
    is not a number counts as the middle of its range.

    Args:
        loss: mean training loss, in nats.
        hit_at_1: 0 to 1.
        examples: trained on.
        bounds: what loss and examples are clipped to.

    Returns:
        int64, shape ``(4,)``, in the order of ``METRIC_NAMES``.
    """
    shares = (1.0, loss / bounds.max_loss, hit_at_1, examples / bounds.max_examples)
    return np.array([_centred(share) for share in shares], dtype=np.int64)


def decode_metrics(
    noised: NDArray[np.int64], *, noise_multiplier: float, bounds: MetricBounds
) -> RoundMetrics:
    """What a noised sum of encoded metrics says (post-processing: it costs nothing more).

    Args:
        noised: int64, shape ``(4,)``.
        noise_multiplier: of these coordinates: noise over ``2**GRID_BITS``.
        bounds: as they were encoded with.
    """
    halves = dict(zip(METRIC_NAMES, (noised / GRID_BOUND).tolist(), strict=True))
    contributors = 2 * halves["contributors"]
    noise = 2 * noise_multiplier

    def mean(name: str, largest: float) -> float | None:
        if contributors < max(1.0, noise):
            return None
        share: float = halves[name] / contributors + 0.5
        return largest * min(max(share, 0.0), 1.0)

    return RoundMetrics(
        contributors=contributors,
        loss=mean("loss", bounds.max_loss),
        hit_at_1=mean("hit_at_1", 1.0),
        examples=mean("examples", bounds.max_examples),
        noise=noise,
    )


def _centred(share: float) -> int:
    if math.isnan(share):
        return 0
    return round((min(max(share, 0.0), 1.0) - 0.5) * 2 * _HALF)
