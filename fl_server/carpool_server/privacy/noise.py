"""Gaussian noise on the integer grid, from the operating system's cryptographic source alone.

There is no seed to give: noise that can be repeated is no noise.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

from carpool.protocol import GRID_BITS

_PER_WORD = 2.0**-64
_LARGEST_RADIUS = math.sqrt(2 * 64 * math.log(2))
"""Of the Box-Muller transform with 64-bit words, in standard deviations: about 9.4."""

_LARGEST_DEVIATION = 2.0**60
"""Noise of this many grid units and more could overflow a sum of 64 bits."""


def gaussian_on_grid(num_values: int, *, noise_multiplier: float) -> NDArray[np.int64]:
    """Independent Gaussian values, each rounded to the nearest integer.

    Guarantees: the standard deviation before rounding is ``noise_multiplier * 2**GRID_BITS``
    grid units, that is noise_multiplier times the L2 bound on one device's update. Added to
    the exact sum of clipped updates it makes the Gaussian mechanism with that noise
    multiplier, for the neighbouring relation "one client's updates become zero". Rounding is
    post-processing of sum + noise, because the sum is an integer. The bits come from
    ``os.urandom``; nothing can seed, store or repeat them. A noise multiplier of 0 gives zeros.

    Slack: values are float64 Box-Muller pairs made of two 64-bit words, so nothing lies beyond
    9.4 standard deviations (a true Gaussian does with probability below 1e-20 per value), and
    each is off by a few float64 roundings: less than 2**-18 grid units at a noise multiplier
    of 1. This approximation is not charged to delta.

    Args:
        num_values: how many.
        noise_multiplier: z, 0 or more, finite.

    Returns:
        int64, shape ``(num_values,)``, in grid units.

    Raises:
        ValueError: a negative or non-finite multiplier, or one whose noise would not fit.

    Source: Box and Muller (1958), doi 10.1214/aoms/1177706645.
    """
    deviation = math.ldexp(noise_multiplier, GRID_BITS)
    if not 0 <= deviation * _LARGEST_RADIUS < _LARGEST_DEVIATION:
        raise ValueError(
            f"Expected a noise multiplier from 0 to about "
            f"{_LARGEST_DEVIATION / _LARGEST_RADIUS / 2**GRID_BITS:.0f}, got {noise_multiplier}."
        )
    if noise_multiplier == 0:
        return np.zeros(num_values, dtype=np.int64)
    pairs = (num_values + 1) // 2
    words = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    # (word + 1) * 2**-64 lies in (0, 1]: the logarithm is finite
    radius = deviation * np.sqrt(-2 * np.log((words[0].astype(np.float64) + 1) * _PER_WORD))
    angle = (2 * math.pi * _PER_WORD) * words[1].astype(np.float64)
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:num_values]
    rounded: NDArray[np.int64] = np.rint(values).astype(np.int64)
    return rounded
