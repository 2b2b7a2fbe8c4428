"""The audit's statistics against values found another way."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import linprog  # it comes with opacus

from carpool_server.privacy.audit import Guesses, epsilon_bound, gaussian_bound, p_value
from carpool_server.privacy.audit.bounds import is_refuted

NORMAL = NormalDist()


def binomial(count: int, accuracy: Fraction) -> list[Fraction]:
    """Exact probabilities of each number of right guesses."""
    return [
        math.comb(count, k) * accuracy**k * (1 - accuracy) ** (count - k) for k in range(count + 1)
    ]


def least_under_gaussian(mu: float, y: float) -> float:
    return NORMAL.cdf(NORMAL.inv_cdf(y) - mu)


@pytest.mark.parametrize(("r", "v"), [(1, 1), (20, 17), (60, 31), (60, 60)])
@pytest.mark.parametrize("odds", [1, 3, 20])
def test_without_delta_it_is_the_binomial_tail(r: int, v: int, odds: int) -> None:
    """Epsilon = log(odds); exact fractions on the other side."""
    exact = sum(binomial(r, Fraction(odds, odds + 1))[v:])
    found = Guesses(canaries=100, guesses=r, correct=v)
    assert p_value(found, epsilon=math.log(odds), delta=0) == pytest.approx(float(exact), rel=1e-9)


def test_deltas_part_is_the_theorems() -> None:
    """Two guesses, both right, by hand: f(2) = q^2, f(1) = 1 - (1-q)^2, f(0) = 1."""
    m, delta, q = 10, 1e-3, 0.75
    found = Guesses(canaries=m, guesses=2, correct=2)
    one, two = (1 - (1 - q) ** 2) - q**2, (1 - q**2) / 2
    expected = q**2 + 2 * m * delta * max(one, two)
    assert one > two
    assert p_value(found, epsilon=math.log(3), delta=delta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("r", "v"), [(10, 10), (100, 80), (1000, 700)])
def test_without_delta_the_bound_is_the_logit_of_clopper_and_pearsons(r: int, v: int) -> None:
    """Accuracy q is refuted where P[Binomial(r, q) >= v] < 5 %."""
    low, high = Fraction(1, 2), Fraction(1)
    for _ in range(25):
        middle = (low + high) / 2
        middle = Fraction(round(middle * 2**30), 2**30)
        if tail(r, v, middle) < Fraction(1, 20):
            low = middle
        else:
            high = middle
    expected = math.log(low / (1 - low))
    found = Guesses(canaries=r, guesses=r, correct=v)
    assert epsilon_bound(found, delta=0, confidence=0.95) == pytest.approx(expected, abs=3e-6)


def tail(r: int, v: int, q: Fraction) -> float:
    return math.fsum(
        math.exp(
            math.log(math.comb(r, k))
            + k * math.log(q)
            + ((r - k) * math.log(1 - q) if q < 1 else 0)
        )
        for k in range(v, r + 1)
    )


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_randomized_response_that_sometimes_tells_is_covered(epsilon: float, delta: float) -> None:
    """Each bit is told with probability delta, else randomised: (epsilon, delta)-DP, m guesses.

    The share of audits with a bound above epsilon is computed, not sampled.
    """
    m, confidence = 200, 0.9
    accuracy = delta + (1 - delta) / (1 + math.exp(-epsilon))
    masses = binomial(m, Fraction(accuracy))
    wrong = Fraction(0)
    for v, mass in enumerate(masses):
        found = Guesses(canaries=m, guesses=m, correct=v)
        if p_value(found, epsilon=epsilon, delta=delta) < 1 - confidence:
            wrong += mass
    assert wrong <= 1 - confidence
    if delta == 0:  # and then it is as sharp as can be: no other test with this error sees more
        assert wrong > 0.5 * (1 - confidence)


@pytest.mark.parametrize("told", [1, 5, 20])
def test_a_mechanism_that_seldom_tells_much_is_covered(told: int) -> None:
    """With probability m * delta / told it tells that many of the bits, at random, else nothing.

    Each bit is told with probability delta: (0, delta)-DP. Told bits are guessed rightly, the
    others by chance; the binomial alone would be far too small where all are told at once.
    """
    m, delta = 20, 0.002
    shown, half = m * delta / told, Fraction(1, 2)
    for v in range(m + 1):
        when_told = float(sum(binomial(m - told, half)[max(0, v - told) :]))
        chance = shown * when_told + (1 - shown) * float(sum(binomial(m, half)[v:]))
        found = Guesses(canaries=m, guesses=m, correct=v)
        assert p_value(found, epsilon=0.0, delta=delta) >= chance
        if v == told == m:
            assert p_value(found, epsilon=0.0, delta=0.0) < chance / 1000


@pytest.mark.parametrize("mu", [0.2, 0.7, 2.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_a_gaussian_is_covered(mu: float, confidence: float) -> None:
    """Each of m bits under its own noise, all guessed by sign: right with Phi(mu / 2).

    The share of audits that refute mu is computed exactly.
    """
    m = 400
    masses = binomial(m, Fraction(NORMAL.cdf(mu / 2)))

    least = functools.partial(least_under_gaussian, mu)
    refuting = sum(
        mass
        for v, mass in enumerate(masses)
        if is_refuted(Guesses(canaries=m, guesses=m, correct=v), least=least, error=1 - confidence)
    )
    assert refuting <= 1 - confidence


def test_for_one_canary_a_gaussians_bound_is_exact() -> None:
    """The one guess is right with probability Phi(mu / 2) at most."""
    found = Guesses(canaries=1, guesses=1, correct=1)
    for mu in (0.5, 1.0, 3.0):
        right = NORMAL.cdf(mu / 2)
        least = functools.partial(least_under_gaussian, mu)
        assert not is_refuted(found, least=least, error=right - 1e-6)
        assert is_refuted(found, least=least, error=right + 1e-6)


@pytest.mark.parametrize(
    ("m", "r", "v", "mu"), [(8, 6, 5, 0.7), (12, 12, 10, 1.5), (12, 5, 4, 0.3)]
)
def test_the_largest_probability_is_a_linear_programs(m: int, r: int, v: int, mu: float) -> None:
    """Over all distributions of right guesses that the curve, as tangents, admits.

    Tangents lie above the curve, so the program's largest is a little above as well.
    """
    rows, limits = [], []
    for k in range(1, r + 1):
        for e in np.linspace(-8, 8, 600):
            delta = NORMAL.cdf(mu / 2 - e / mu) - math.exp(e) * NORMAL.cdf(-mu / 2 - e / mu)
            row = [
                (i >= k) * i / m - math.exp(e) * (i >= k - 1) * (r - i) / m for i in range(r + 1)
            ]
            rows.append(np.array(row) / max(1, math.exp(e)))
            limits.append(delta / max(1, math.exp(e)))
    aim = [-float(i >= v) for i in range(r + 1)]
    solved = linprog(aim, rows, limits, [np.ones(r + 1)], [1], bounds=(0, 1))
    assert solved.success
    found, largest = Guesses(canaries=m, guesses=r, correct=v), -solved.fun
    least = functools.partial(least_under_gaussian, mu)
    assert is_refuted(found, least=least, error=largest)
    assert not is_refuted(found, least=least, error=largest * 0.999)


def test_pure_dp_by_the_trade_off_curve_is_no_smaller_than_the_binomial() -> None:
    """Two theorems on one claim: what the curve's refutes the exact tail must refute too."""
    r, odds = 40, 3.0

    def least(y: float) -> float:
        return max(y / odds, 1 - odds * (1 - y))

    for v in range(20, r + 1):
        found = Guesses(canaries=100, guesses=r, correct=v)
        exact = p_value(found, epsilon=math.log(odds), delta=0)
        assert not is_refuted(found, least=least, error=exact * 0.999)
    best = Guesses(canaries=r, guesses=r, correct=r)
    # all right, all guessed: there the curve's is exact
    exact = p_value(best, epsilon=math.log(odds), delta=0)
    assert is_refuted(best, least=least, error=min(1.0, 30 * exact))


def test_bounds_grow_with_right_guesses_and_fall_with_confidence() -> None:
    """So both bounds are above the stated epsilon together from some number on."""
    for bound in (epsilon_bound, gaussian_bound):
        by_correct = [
            bound(Guesses(canaries=1000, guesses=100, correct=v), delta=1e-5, confidence=0.95)
            for v in range(50, 101, 5)
        ]
        assert by_correct == sorted(by_correct)
        assert by_correct[0] == 0 < by_correct[-1]
        found = Guesses(canaries=1000, guesses=100, correct=90)
        by_confidence = [bound(found, delta=1e-5, confidence=c) for c in (0.5, 0.9, 0.99)]
        assert by_confidence == sorted(by_confidence, reverse=True)


def test_a_gaussian_bound_is_epsilon_of_the_largest_refuted_mu() -> None:
    """By the Gaussian's own delta: Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu)."""
    found = Guesses(canaries=500, guesses=500, correct=330)
    epsilon = gaussian_bound(found, delta=1e-5, confidence=0.95)
    low, high = 0.01, 5.0
    for _ in range(30):
        mu = (low + high) / 2
        refuted = is_refuted(found, least=functools.partial(least_under_gaussian, mu), error=0.05)
        low, high = (mu, high) if refuted else (low, mu)
    first, second = (NORMAL.cdf(sign * low / 2 - epsilon / low) for sign in (1, -1))
    assert first - math.exp(epsilon) * second == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(("m", "r", "v"), [(10, 5, 6), (10, 11, 5), (10, 0, 0), (10, 5, -1)])
def test_numbers_that_cannot_be_are_refused(m: int, r: int, v: int) -> None:
    """More right than guessed, more guessed than there are, none, fewer than none."""
    with pytest.raises(ValueError, match=r"^Expected 0 <= correct <= guesses <= canaries, got "):
        Guesses(canaries=m, guesses=r, correct=v)
