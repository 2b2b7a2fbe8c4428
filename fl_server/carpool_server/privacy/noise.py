"""Gaussian noise for sums on the grid."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carpool.errors import PrivacyError
from carpool.gaussian import LARGEST_SCALE, SMALLEST_SCALE, discrete_gaussian
from carpool.protocol import GRID_BITS, GRID_BOUND


def noise_scale(noise_multiplier: float) -> int:
    """The noise's standard deviation in whole grid units, rounded up; 0 for no noise.

    Raises:
        PrivacyError: a negative or non-finite multiplier, one so small that the sampler's error
            could not be stated, or one whose noise would not fit.
    """
    least, most = (scale / GRID_BOUND for scale in (SMALLEST_SCALE, LARGEST_SCALE >> 8))
    if noise_multiplier != 0 and not least <= noise_multiplier <= most:
        raise PrivacyError(
            f"expected a noise multiplier of 0, or from {least:.3g} to {most:.0f}, got "
            f"{noise_multiplier}."
        )
    return math.ceil(math.ldexp(noise_multiplier, GRID_BITS))


def gaussian_on_grid(num_values: int, *, scale: int) -> NDArray[np.int64]:
    """Independent Gaussian values on the grid.

    Guarantees: added to the exact sum of updates whose norm is at most ``2**GRID_BITS`` each,
    it makes the Gaussian mechanism with noise multiplier ``scale / 2**GRID_BITS``, for the
    neighbouring relations "add or remove one client" and "what one client adds becomes zero",
    rounded to the grid: the sum is an integer, so rounding sum + noise is post-processing. A
    scale of 0 gives zeros. Nothing can seed, store or repeat it.

    Slack: each value's probability is off by a factor within
    ``exp(+-log_ratio_bound(scale))``, and nothing lies beyond 11 standard deviations
    (``carpool.gaussian``); the accounting charges both.

    Args:
        num_values: how many.
        scale: standard deviation in grid units, from ``noise_scale``.

    Returns:
        int64, shape ``(num_values,)``, in grid units.

    Raises:
        ValueError: a scale that the sampler does not take.
    """
    if scale == 0:
        return np.zeros(num_values, dtype=np.int64)
    return discrete_gaussian(num_values, scale=scale)
