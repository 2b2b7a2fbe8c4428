"""Epsilon against a second accountant, a closed form and the settings' published values."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy import optimize, stats

from carpool.errors import PrivacyError
from carpool_server.privacy import accounting, epsilon_spent, noise_multiplier_for

POPULATION, COHORT, DELTA = 801, 50, 1e-5


def pld_epsilon(z: float, q: float, rounds: int, delta: float) -> float:
    """dp-accounting's privacy loss distributions."""
    event = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z))
    accountant = PLDAccountant()
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(z: float, rounds: int, delta: float) -> float:
    """Without sampling: the analytic Gaussian (Balle and Wang, 2018, arXiv 1805.06530)."""
    mu = math.sqrt(rounds) / z

    def excess(epsilon: float) -> float:
        normal = stats.norm.cdf
        below = normal(mu / 2 - epsilon / mu)
        return float(below - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu) - delta)

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize(
    ("z", "q", "rounds"),
    [
        (0.693, COHORT / POPULATION, 60),
        (1.353, COHORT / POPULATION, 60),
        (1.0, 0.01, 200),
        (4, 1, 1),
    ],
)
def test_epsilon_is_that_of_privacy_loss_distributions(z: float, q: float, rounds: int) -> None:
    """Within 2 % and the accountant's own error bound, and not below by more than that."""
    ours = epsilon_spent([(z, q)] * rounds, delta=DELTA)
    other = pld_epsilon(z, q, rounds, DELTA)
    assert abs(ours - other) <= 0.02 * other + 2 * accounting.EPSILON_ERROR


@pytest.mark.parametrize(("z", "rounds"), [(5.0, 10), (2.0, 1), (20.0, 60)])
def test_without_sampling_epsilon_is_the_closed_form(z: float, rounds: int) -> None:
    """At q = 1 the mechanism is a plain Gaussian, whose epsilon is known; ours is not below."""
    ours = epsilon_spent([(z, 1.0)] * rounds, delta=DELTA)
    exact = gaussian_epsilon(z, rounds, DELTA)
    assert exact - 1e-6 <= ours <= exact + 2 * accounting.EPSILON_ERROR + 0.005 * exact


@pytest.mark.parametrize(("epsilon", "z"), [(8.0, 0.693), (2.0, 1.353)])
def test_the_noise_for_a_target_is_the_known_one_and_keeps_it(epsilon: float, z: float) -> None:
    """The multipliers that an earlier search found for 801 clients, 50 expected, 60 rounds."""
    q = COHORT / POPULATION
    found = noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=q, rounds=60)
    assert found == pytest.approx(z, abs=2e-3)
    assert epsilon - 0.011 <= epsilon_spent([(found, q)] * 60, delta=DELTA) <= epsilon


def test_epsilon_grows_with_every_round_and_starts_at_zero() -> None:
    """Nothing released costs nothing."""
    spent = [epsilon_spent([(1.0, 0.1)] * rounds, delta=DELTA) for rounds in range(4)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))


def test_a_target_below_the_accountants_resolution_is_refused() -> None:
    """At once, and not after minutes of searching."""
    with pytest.raises(PrivacyError) as caught:
        noise_multiplier_for(epsilon=0.04, delta=1e-5, sampling_rate=0.5, rounds=10)
    assert str(caught.value) == (
        "privacy.epsilon: expected at least 0.05, since the accountant is exact to 0.01 only, "
        "got 0.04."
    )


def test_the_smallest_target_can_be_met() -> None:
    """It is found, and kept."""
    z = noise_multiplier_for(
        epsilon=accounting.SMALLEST_EPSILON, delta=1e-3, sampling_rate=0.05, rounds=2
    )
    assert epsilon_spent([(z, 0.05)] * 2, delta=1e-3) <= accounting.SMALLEST_EPSILON


def test_a_search_that_fails_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus gives up at a noise multiplier of a million."""
    import opacus.accountants.utils  # noqa: PLC0415  seconds, and only here

    monkeypatch.setattr(opacus.accountants.utils, "MAX_SIGMA", 10)
    with pytest.raises(PrivacyError) as caught:
        noise_multiplier_for(epsilon=0.05, delta=1e-9, sampling_rate=0.9, rounds=300)
    assert str(caught.value) == (
        "no noise is large enough for epsilon 0.05 at delta 1e-09 over 300 rounds at sampling "
        "rate 0.9000: The privacy budget is too low. Raise epsilon."
    )
