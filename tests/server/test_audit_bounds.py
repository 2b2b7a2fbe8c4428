"""The audit's statistics against values found another way."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from statistics import NormalDist

import pytest

from carpool_server.privacy.accounting import Release, epsilon_of
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
    """With probability m * delta / told it tells ``told`` of the bits, else nothing.

    Each bit is told with probability delta: (0, delta)-DP. It is what delta's part is for:
    the binomial alone would be far too small.
    """
    m, delta = 20, 0.002
    shown = m * delta / told
    chance = float(sum(binomial(m - told, Fraction(1, 2))[: 1 + (m - told) // 2]))
    at_least = told + math.ceil((m - told) / 2)
    # right with certainty where told, by a coin elsewhere; all guessed
    by_telling = shown * float(sum(binomial(m - told, Fraction(1, 2))[at_least - told :]))
    by_chance = (1 - shown) * float(sum(binomial(m, Fraction(1, 2))[at_least:]))
    found = Guesses(canaries=m, guesses=m, correct=at_least)
    assert chance > 0.5
    assert p_value(found, epsilon=0.0, delta=delta) >= by_telling + by_chance
    if told == m:
        assert p_value(found, epsilon=0.0, delta=0.0) < by_telling + by_chance


@pytest.mark.parametrize("mu", [0.2, 0.7, 2.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_a_gaussian_is_covered_and_nearly_found(mu: float, confidence: float) -> None:
    """Each of m bits under its own noise, all guessed by sign: right with Phi(mu / 2).

    The share of audits that refute mu is computed exactly; a somewhat smaller mu mostly is.
    """
    m = 600
    masses = binomial(m, Fraction(NORMAL.cdf(mu / 2)))

    def refuting(claimed: float) -> float:
        share = Fraction(0)
        for v, mass in enumerate(masses):
            found = Guesses(canaries=m, guesses=m, correct=v)
            least = functools.partial(least_under_gaussian, claimed)
            if is_refuted(found, least=least, error=1 - confidence):
                share += mass
        return float(share)

    assert refuting(mu) <= 1 - confidence
    assert refuting(mu * 0.4) > 0.5


def test_a_gaussian_that_tells_all_or_nothing_is_covered() -> None:
    """All coins equal in what is seen: every guess is right or wrong together.

    One draw N(mu * s, 1) of one bit s, of which all guesses are made: the hardest for a bound
    that would take guesses to be independent. With m = 1 canary there is one guess, which is
    right with probability Phi(mu / 2) at most: the bound may refute only below that.
    """
    found = Guesses(canaries=1, guesses=1, correct=1)
    for mu in (0.5, 1.0, 3.0):
        right = NORMAL.cdf(mu / 2)
        least = functools.partial(least_under_gaussian, mu)
        assert not is_refuted(found, least=least, error=right - 1e-6)
        assert is_refuted(found, least=least, error=right + 1e-6)


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


def test_a_gaussian_bound_is_an_epsilon_of_the_accountants() -> None:
    """Z = 1 / mu, whose epsilon PRV states too."""
    found = Guesses(canaries=500, guesses=500, correct=330)
    epsilon = gaussian_bound(found, delta=1e-5, confidence=0.95)
    low, high = 0.01, 5.0
    for _ in range(40):
        mu = (low + high) / 2
        refuted = is_refuted(found, least=functools.partial(least_under_gaussian, mu), error=0.05)
        low, high = (mu, high) if refuted else (low, mu)
    stated = epsilon_of([Release(noise_multiplier=1 / low)], delta=1e-5)
    assert epsilon == pytest.approx(stated.value, abs=0.02)


@pytest.mark.parametrize(("m", "r", "v"), [(10, 5, 6), (10, 11, 5), (10, 0, 0), (10, 5, -1)])
def test_numbers_that_cannot_be_are_refused(m: int, r: int, v: int) -> None:
    """More right than guessed, more guessed than there are, none, fewer than none."""
    with pytest.raises(ValueError, match=r"^Expected 0 <= correct <= guesses <= canaries, got "):
        Guesses(canaries=m, guesses=r, correct=v)
