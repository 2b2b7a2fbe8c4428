"""Gaussians without sampling: their composition is one Gaussian, whose epsilon is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from carpool.errors import PrivacyError
from carpool_server.privacy.accounting.releases import Group

_PRECISION = 1e-10
"""Relative: how far above the exact value the result may be."""

_LARGEST_EXPONENT = 600.0
"""``exp`` of more than 709 is no float64."""


def epsilon(groups: Sequence[Group], *, delta: float) -> float:
    """Epsilon of a composition of Gaussians, from its closed form.

    With mu = sqrt(sum of 1 / z**2), delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) *
    Phi(-mu/2 - epsilon/mu), which falls in epsilon.

    Guarantees: the smallest epsilon that delta admits, rounded up by at most 1e-10 of it and
    float64's error in the formula; above 600 the upper bound without the second term. Any
    relation for which one client moves each sum by at most the clip: add or remove, or updates
    become zero.

    Args:
        groups: what is composed, all of sampling rate 1; at least one.
        delta: in (0, 1).

    Raises:
        PrivacyError: a sampling rate below 1.

    Source: Balle and Wang (2018), arXiv 1805.06530, theorem 8; composition: Dong, Roth and Su
    (2019), arXiv 1905.02383, corollary 3.3.
    """
    if sampled := [g.sampling_rate for g in groups if g.sampling_rate != 1]:
        raise PrivacyError(
            f"closed form of the Gaussian: expected sampling rate 1, got {sampled[0]:g}. Use "
            "method 'prv' for sampled releases."
        )
    mu = math.sqrt(math.fsum(g.releases / g.noise_multiplier**2 for g in groups))
    # without the second term delta is only larger
    upper = mu * (mu / 2 - NormalDist().inv_cdf(delta))
    if upper > _LARGEST_EXPONENT:
        return upper
    if upper <= 0 or _delta(0.0, mu=mu) <= delta:
        return 0.0
    lower = 0.0
    while upper - lower > _PRECISION * upper:
        middle = (lower + upper) / 2
        if _delta(middle, mu=mu) <= delta:
            upper = middle
        else:
            lower = middle
    return upper


def _delta(of_epsilon: float, *, mu: float) -> float:
    return _phi(mu / 2 - of_epsilon / mu) - math.exp(of_epsilon) * _phi(-mu / 2 - of_epsilon / mu)


def _phi(x: float) -> float:
    """The normal distribution function, with a small relative error far below 0 too."""
    return math.erfc(-x / math.sqrt(2)) / 2
