"""From right guesses to a lower bound on epsilon: the statistics of a one-run audit.

Each of m canaries is in or out by a fair coin of its own. Whoever sees what was released guesses
r of the coins. A mechanism that keeps its promise allows so many right guesses and no more; a
promise under which as many as were right are too unlikely is refuted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from carpool_server.privacy.accounting.gaussian import epsilon as gaussian_epsilon
from carpool_server.privacy.accounting.releases import Group

LARGEST_EPSILON = 64.0
"""No bound above it is looked for."""

_PRECISION = 1e-6
"""Absolute: how far below the exact bound a result may be."""

_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guesses:
    """What an audit came to.

    Attributes:
        canaries: m, each in with probability 1/2, independently.
        guesses: r, a number that does not depend on what was released.
        correct: v.

    Raises:
        ValueError: not ``0 <= correct <= guesses <= canaries``, or no guess.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if not (0 <= self.correct <= self.guesses <= self.canaries and self.guesses):
            raise ValueError(f"Expected 0 <= correct <= guesses <= canaries, got {self}.")


def p_value(found: Guesses, *, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, if (epsilon, delta)-DP holds.

    With f(v) = P[Binomial(r, 1 / (1 + exp(-epsilon))) >= v]::

        p = f(v) + 2 * m * delta * max over i from 1 to v of (f(v - i) - f(v)) / i

    Guarantees: an upper bound, up to float64's error in the binomial (1e-9 of it), for every
    mechanism that is (epsilon, delta)-DP in each canary (in against out) and every way to guess
    that leaves no choice of r to the release.

    Source: Steinke, Nasr and Jagielski (2023), arXiv 2305.08846, theorem 5.2 with r guesses of
    +-1 and m - r abstentions.
    """
    masses = _binomial(found.guesses, epsilon=epsilon)
    v = found.correct
    beta = float(masses[v:].sum())
    if v == 0:
        return 1.0
    below = np.cumsum(masses[v - 1 :: -1])  # P[v - i <= Binomial < v] for i = 1 .. v
    alpha = float((below / np.arange(1, v + 1)).max())
    return min(1.0, beta + 2 * found.canaries * delta * alpha)


def epsilon_bound(found: Guesses, *, delta: float, confidence: float) -> float:
    """A lower bound on epsilon at ``delta``, whatever the mechanism.

    Guarantees: of audits of a mechanism that is (epsilon, delta)-DP at most a share of
    ``1 - confidence`` give more than epsilon. 0 where nothing can be said.

    Source: as ``p_value``, inverted.
    """
    error = 1 - confidence
    return _largest(lambda epsilon: p_value(found, epsilon=epsilon, delta=delta) < error)


def gaussian_bound(found: Guesses, *, delta: float, confidence: float) -> float:
    """A lower bound on epsilon at ``delta``, if the mechanism is a Gaussian one.

    Guarantees: of audits of a mechanism that is as private as one Gaussian release (mu-GDP, as
    every composition of Gaussian releases is, each dependent on those before) at most a share
    of ``1 - confidence`` give more than the epsilon of that release. It bounds mu, and says
    what epsilon that is: a mechanism that is (epsilon, delta)-DP in another way may pass it.
    0 where nothing can be said.

    Source: as ``is_refuted``; epsilon of mu: ``accounting.gaussian``.
    """
    error = 1 - confidence

    def refuted(mu: float) -> bool:
        if mu == 0:
            return is_refuted(found, least=lambda y: y, error=error)
        return is_refuted(found, least=lambda y: _NORMAL.cdf(_NORMAL.inv_cdf(y) - mu), error=error)

    mu = _largest(refuted)
    if mu == 0:
        return 0.0
    return gaussian_epsilon([Group(1 / mu, 1.0, 1)], delta=delta)


def is_refuted(found: Guesses, *, least: Callable[[float], float], error: float) -> bool:
    """Whether so many right guesses have a probability below ``error`` under a trade-off curve.

    Guarantees: false for all but a share ``error`` of audits of a mechanism that is f-DP in each
    canary. How: let p_i be the probability of i right guesses. Flip the coin of one canary,
    guessed rightly: the release is the same set of outcomes under a neighbour, with one right
    guess less. Averaged over canaries, and because f is convex, for every k::

        sum over i >= k of (i / m) p_i  <=  1 - f(sum over i >= k - 1 of ((r - i) / m) p_i)

    The probabilities with the least sum that have P[at least v right] = ``error`` are found
    from k = v downward: all of ``error`` at v, then the least p_(k-1) that the inequality asks
    for (mass at fewer right guesses brings more to the right side and less to the left). If
    that sum is above 1 there is no such mechanism.

    Args:
        found: the guesses.
        least: y -> the least x with ``1 - f(x) >= y``, for y in (0, 1); f symmetric.
        error: in (0, 1).

    Source: Mahloujifar, Melis and Chaudhuri (2025), arXiv 2410.22235, theorem and algorithm for
    empirical f-DP; the argument above is the proof for r guesses that are right or wrong.
    """
    m, r, v = found.canaries, found.guesses, found.correct
    right, wrong = error * v / m, error * (r - v) / m
    for k in range(v, 0, -1):
        missing = least(right) - wrong
        if missing > 0:
            wrong += missing
            right += missing * (k - 1) / (r - k + 1)
        if right + wrong > r / m:
            return True
    return False


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest parameter that is refuted, to the precision, from below."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, LARGEST_EPSILON
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _binomial(count: int, *, epsilon: float) -> NDArray[np.float64]:
    """P[Binomial(count, 1 / (1 + exp(-epsilon))) = k], k from 0 to count."""
    ways, k = _log_ways(count), np.arange(count + 1)
    right, wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    masses: NDArray[np.float64] = np.exp(ways + k * right + (count - k) * wrong)
    return masses


@functools.lru_cache(maxsize=8)
def _log_ways(count: int) -> NDArray[np.float64]:
    """Logarithms of the binomial coefficients."""
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    ways: NDArray[np.float64] = logs[-1] - logs - logs[::-1]
    return ways
