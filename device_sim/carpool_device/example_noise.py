"""The noise on a step's sum of clipped gradients, and what it is an approximation of."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carpool.gaussian import TAIL_PROBABILITY, discrete_gaussian, log_ratio_bound
from carpool.rdp import LEAST_NOISE, RenyiCurve

SENSITIVITY_SLACK = 1e-3
"""One example moves a step's sum by at most C times one more than this; the noise is that much
larger.

What is proved: the grid's part, at most the square root of P times 2**-30 of C (6e-7 for 400,000
values). What is measured on the real programs and not proved: the program's part. It clips and
adds in float32, so a clipped gradient may be a little longer than C (more so where its tokens'
parts cancel), and the rounding of the others' gradients depends on who else is in the chunk.
``docs/device.md`` gives the figures, thousandths of the slack, and the tests that make them."""

GRID_BITS = 30
"""A step's sum lies on an integer grid of step C * 2**-GRID_BITS when the noise is added."""


def with_noise(
    total: NDArray[np.float64], *, noise_multiplier: float, clip_norm: float
) -> NDArray[np.float64]:
    """A step's sum with its noise.

    Both are integers when they meet, so nothing about the sum shows in the digits of the result
    (Mironov, 2012, doi 10.1145/2382196.2382264): the sum over C * 2**-30, to the nearest integer
    (ties to even), and discrete Gaussian noise of scale ``noise_scale(noise_multiplier)``. Their
    sum, below 2**63, times C * 2**-30 is what comes back; the rest is post-processing.

    Args:
        total: float64; every value at most 2**31 times C.
        noise_multiplier: z.
        clip_norm: C.
    """
    grid = math.ldexp(clip_norm, -GRID_BITS)
    noise = discrete_gaussian(total.size, scale=noise_scale(noise_multiplier))
    noised: NDArray[np.int64] = np.rint(total / grid).astype(np.int64) + noise
    return np.multiply(noised, grid, dtype=np.float64)


def noise_scale(noise_multiplier: float) -> int:
    """The noise's standard deviation on the grid: z * 2**30 * (1 + slack), rounded up."""
    return math.ceil(math.ldexp(noise_multiplier * (1 + SENSITIVITY_SLACK), GRID_BITS))


def sampler_error(num_values: int) -> RenyiCurve:
    """What the sampler's distance from a Gaussian costs in a step; less noise is further off."""
    log_ratio = log_ratio_bound(noise_scale(LEAST_NOISE))
    return RenyiCurve(log_ratio=num_values * log_ratio, tail=num_values * TAIL_PROBABILITY)
