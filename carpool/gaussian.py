"""Gaussian noise on the integers: exact but for a stated error, from the system's source alone.

There is no seed to give: noise that can be repeated is no noise. Both sides of the network
draw it here: the coordinator for sums of devices' updates, a device for sums of its examples'
gradients.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_LAST_STEP = 10
"""Values lie within ``_LAST_STEP + 1`` standard deviations."""

TAIL_PROBABILITY = 4e-28
"""What a Gaussian has beyond 11 standard deviations (3.83e-28), and this noise has not."""

SMALLEST_SCALE, LARGEST_SCALE = 1 << 16, 1 << 58


def discrete_gaussian(count: int, *, scale: int) -> NDArray[np.int64]:
    """Independent integers n with probabilities proportional to ``exp(-n**2 / (2 * scale**2))``.

    Guarantees: every value's probability is that of a Gaussian of standard deviation ``scale``
    rounded to the nearest integer, times a factor within ``exp(+-log_ratio_bound(scale))``;
    none lies beyond 11 standard deviations, where the Gaussian has ``TAIL_PROBABILITY``. All
    bits come from ``os.urandom``; nothing can seed, store or repeat them.

    How: n = +-(k * scale + u) with k from 0 to 10 drawn with probability proportional to
    ``exp(-k**2 / 2)`` (thresholds of 128 bits), u uniform in [0, scale) without bias, accepted
    with probability ``exp(-x * (2 * k + x) / 2)``, x = u / scale; a negative zero is rejected.
    About 71 % are accepted.

    Args:
        count: how many.
        scale: the standard deviation, from ``SMALLEST_SCALE`` to ``LARGEST_SCALE``.

    Returns:
        int64, shape ``(count,)``.

    Raises:
        ValueError: another scale.

    Source: Karney (2016), doi 10.1145/2710016, algorithm D with its Bernoulli factors taken
    from the exponential itself; distribution: Canonne, Kamath and Steinke (2020), arXiv
    2004.00010.
    """
    _check(scale)
    return _sample(count, scale=scale)


def log_ratio_bound(scale: int) -> float:
    """How far the noise's log probabilities are from a rounded Gaussian's, within 11 deviations.

    Of it 2**-45 are float64's share: the exponent is at most 10.5 and off by four roundings
    (10.5 * 2**-51), ``exp`` by four units in the last place (2**-51), the threshold it is made
    into by 2**-63 of at least exp(-10.5); all of it twice, because of the normalisation. The
    rest, ``6 / scale**2``, is what lies between a Gaussian at n and its mean over n +- 1/2: the
    factor sinh(a) / a at a = n / (2 * scale**2), at most exp(121 / (24 * scale**2)), and at
    least 1 - 1 / (8 * scale**2).

    Raises:
        ValueError: a scale that ``discrete_gaussian`` does not take.
    """
    _check(scale)
    return 2.0**-45 + 6 / scale**2


def _check(scale: int) -> None:
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(
            f"Expected a standard deviation of {SMALLEST_SCALE} to {LARGEST_SCALE} integers, "
            f"got {scale}."
        )


def _thresholds() -> list[int]:
    """``2**128 * P(k <= i)`` for i below the last step, to the nearest integer."""
    # exp(-1/2) as a fraction: the series to its 60th term is off by less than 2**-300
    root = sum(Fraction((-1) ** i, 2**i * math.factorial(i)) for i in range(60))
    weights = [root ** (k * k) for k in range(_LAST_STEP + 1)]
    total = sum(weights)
    return [round(2**128 * sum(weights[: k + 1]) / total) for k in range(_LAST_STEP)]


_THRESHOLDS = _thresholds()
_HIGH = np.array([threshold >> 64 for threshold in _THRESHOLDS], dtype=np.uint64)


def _sample(count: int, *, scale: int) -> NDArray[np.int64]:
    values = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        # a little more than the expected need, so that one pass mostly does
        tries = int((count - done) * 1.42) + 64
        accepted = _accepted(tries, scale=scale)[: count - done]
        values[done : done + accepted.size] = accepted
        done += accepted.size
    return values


def _accepted(tries: int, *, scale: int) -> NDArray[np.int64]:
    step = _steps(tries)
    word = _words(tries)
    whole = (1 << 64) // scale * scale  # words from here on would favour small offsets
    offset = (word % np.uint64(scale)).astype(np.int64)
    x = offset / np.float64(scale)
    probability = np.exp(x * (2 * step + x) * -0.5)
    coin = _words(tries)
    taken = coin >> np.uint64(1) < (probability * 2.0**63).astype(np.uint64)
    taken &= word <= np.uint64(whole - 1)
    values = step * scale + offset
    negative = (coin & np.uint64(1)).astype(np.bool_)
    taken &= ~(negative & (values == 0))
    np.negative(values, where=negative, out=values)
    return values[taken]


def _steps(count: int) -> NDArray[np.int64]:
    """Each try's k: how many thresholds are at most a uniform integer of 128 bits."""
    high = _words(count)
    steps = np.searchsorted(_HIGH, high, side="right").astype(np.int64)
    # the lower 64 bits matter where the upper ones equal a threshold's
    for place in np.flatnonzero(_HIGH[np.maximum(steps - 1, 0)] == high):
        steps[place] = bisect_right(_THRESHOLDS, int(high[place]) << 64 | int(_words(1)[0]))
    return steps


def _words(count: int) -> NDArray[np.uint64]:
    """Uniform 64-bit words of the operating system's cryptographic source."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
