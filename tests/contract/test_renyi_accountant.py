"""The phone's accountant against Opacus's and dp-accounting's."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from pydantic import ValidationError

from carpool.errors import PrivacyError
from carpool.rdp import (
    LEAST_NOISE,
    NOISE_STEP,
    ORDERS,
    RenyiCurve,
    epsilon_of_steps,
    noise_multiplier_for_steps,
    subsampled_gaussian,
)

DELTA = 1e-5
NOTHING = RenyiCurve()


@pytest.mark.parametrize("z", [0.3, 0.7, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("q", [0.001, 0.05, 0.25, 0.9, 1.0])
def test_a_steps_divergences_are_those_of_opacus(q: float, z: float) -> None:
    """At every order; 1e-9 is what Opacus loses where divergences are small."""
    ours = subsampled_gaussian(noise_multiplier=z, sampling_rate=q).rdp
    theirs = compute_rdp(q=q, noise_multiplier=z, steps=1, orders=list(ORDERS))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=0)


@pytest.mark.filterwarnings("ignore:Optimal order is")
@pytest.mark.parametrize(("z", "q", "steps"), [(1.0, 0.05, 200), (2.5, 0.3, 60), (0.7, 1.0, 3)])
def test_epsilon_of_unequal_steps_is_that_of_opacus(z: float, q: float, steps: int) -> None:
    """Half of the steps at twice the noise: the curves add up."""
    more = steps // 2
    curve = subsampled_gaussian(noise_multiplier=z, sampling_rate=q).times(steps)
    curve += subsampled_gaussian(noise_multiplier=2 * z, sampling_rate=q / 2).times(more)
    theirs = sum(
        compute_rdp(q=rate, noise_multiplier=noise, steps=count, orders=list(ORDERS))
        for rate, noise, count in ((q, z, steps), (q / 2, 2 * z, more))
    )
    epsilon, _ = get_privacy_spent(orders=list(ORDERS), rdp=theirs, delta=DELTA)
    assert curve.epsilon(delta=DELTA) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(
    ("q", "epsilon", "steps", "most"),
    [
        *((q, epsilon, 20, 1.15) for q in (0.25, 0.5, 1.0) for epsilon in (1.0, 2.0, 8.0)),
        (0.05, 0.5, 200, 1.15),
        # a Renyi bound is loose where few examples are drawn a few times
        (0.05, 2.0, 20, 1.3),
        (0.05, 0.5, 1, 2.0),
    ],
)
def test_epsilon_is_a_little_above_that_of_privacy_loss_distributions(
    q: float, epsilon: float, steps: int, most: float
) -> None:
    """An upper bound, and at most this many times the tight one."""
    z = noise_multiplier_for_steps(
        epsilon=epsilon, delta=DELTA, sampling_rate=q, steps=steps, spent=NOTHING
    )
    ours = epsilon_of_steps(noise_multiplier=z, sampling_rate=q, steps=steps, delta=DELTA)
    accountant = PLDAccountant()
    event = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z))
    accountant.compose(event, steps)
    tight = float(accountant.get_epsilon(DELTA))
    assert tight <= ours <= most * tight


def test_small_divergences_keep_their_digits() -> None:
    """At order 2 the moment is 1 + q^2 (exp(1 / z^2) - 1), which log1p and expm1 know to the bit.

    Summed as it stands, the moment would be 1 + 1e-12 and have lost 12 digits.
    """
    found = subsampled_gaussian(noise_multiplier=1000.0, sampling_rate=1e-3).rdp[0]
    assert found == pytest.approx(math.log1p(1e-6 * math.expm1(1e-6)), rel=1e-13)


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"), [(0.5, 0.05, 200), (2.0, 0.3, 20), (8.0, 1.0, 7), (8.0, 0.01, 100)]
)
def test_the_noise_for_a_budget_is_the_least(epsilon: float, q: float, steps: int) -> None:
    """By Opacus; a thousandth less breaks the budget."""

    def opacus(z: float) -> float:
        rdp = compute_rdp(q=q, noise_multiplier=z, steps=steps, orders=list(ORDERS))
        return float(get_privacy_spent(orders=list(ORDERS), rdp=rdp, delta=DELTA)[0])

    z = noise_multiplier_for_steps(
        epsilon=epsilon, delta=DELTA, sampling_rate=q, steps=steps, spent=NOTHING
    )
    assert z == round(z, 3)
    assert opacus(z) <= epsilon < opacus(z - NOISE_STEP)


def test_noise_after_some_is_spent_is_more() -> None:
    """The same steps, with half of the budget gone."""
    fields = {"epsilon": 2.0, "delta": DELTA, "sampling_rate": 0.3, "steps": 20}
    first = noise_multiplier_for_steps(**fields, spent=NOTHING)
    half = subsampled_gaussian(noise_multiplier=first, sampling_rate=0.3).times(10)
    later = noise_multiplier_for_steps(**fields, spent=half)
    assert later > first
    steps = subsampled_gaussian(noise_multiplier=later, sampling_rate=0.3).times(20)
    assert 1.99 < (half + steps).epsilon(delta=DELTA) <= 2


def test_a_budget_beyond_need_gets_the_least_noise_that_is_given() -> None:
    """Never none."""
    found = noise_multiplier_for_steps(
        epsilon=1e6, delta=DELTA, sampling_rate=1.0, steps=1, spent=NOTHING
    )
    assert found == LEAST_NOISE


def test_a_budget_that_is_spent_is_refused() -> None:
    """Whole message."""
    spent = subsampled_gaussian(noise_multiplier=1.0, sampling_rate=1.0)
    epsilon = spent.epsilon(delta=DELTA)
    with pytest.raises(PrivacyError) as caught:
        noise_multiplier_for_steps(
            epsilon=2.0, delta=DELTA, sampling_rate=1.0, steps=3, spent=spent
        )
    assert str(caught.value) == (
        "no noise is large enough for 3 more steps within epsilon 2 at delta 1e-05: "
        f"{epsilon:g} of it is spent."
    )


def test_an_approximate_samplers_error_is_charged() -> None:
    """The least epsilon e + 2 a with exp(a) (d(e) + exp(e) t) <= delta, by a scan over e.

    d(e) is the ideal mechanism's delta, from the same theorem solved the other way.
    """
    a, t = 0.01, 1e-7
    ideal = subsampled_gaussian(noise_multiplier=2.0, sampling_rate=0.5).times(3)
    charged = RenyiCurve(rdp=ideal.rdp, log_ratio=a, tail=t)

    def delta_of(e: float) -> float:
        return min(
            math.exp((o - 1) * (rho - e)) * (1 - 1 / o) ** o / (o - 1)
            for o, rho in zip(ORDERS, ideal.rdp, strict=True)
            if (o - 1) * (rho - e) < 700
        )

    step = 1e-3
    scan = next(
        i * step
        for i in range(5_000)
        if math.exp(a) * (delta_of(i * step) + math.exp(i * step) * t) <= DELTA
    )
    found = charged.epsilon(delta=DELTA)
    assert scan - step <= found - 2 * a <= scan
    assert found > ideal.epsilon(delta=DELTA) + 2 * a
    assert RenyiCurve(rdp=ideal.rdp, tail=DELTA).epsilon(delta=DELTA) == math.inf


def test_nothing_costs_nothing_and_epsilon_grows_with_steps() -> None:
    """From 0 on, and never down again."""
    spent = [
        epsilon_of_steps(noise_multiplier=1.0, sampling_rate=0.1, steps=steps, delta=DELTA)
        for steps in range(6)
    ]
    assert spent[0] == 0
    assert spent == sorted(set(spent))


def test_a_curve_survives_being_stored() -> None:
    """To the last bit, also where nothing is hidden; another version's orders are refused."""
    curve = subsampled_gaussian(noise_multiplier=1e-100, sampling_rate=0.3) + subsampled_gaussian(
        noise_multiplier=0.9, sampling_rate=0.3
    )
    assert RenyiCurve.model_validate_json(curve.model_dump_json()) == curve
    assert curve.epsilon(delta=DELTA) > 1e100
    with pytest.raises(ValidationError, match=f"expected {len(ORDERS)} divergences, got 1"):
        RenyiCurve(rdp=(1.0,))


@pytest.mark.parametrize(
    ("z", "q", "message"),
    [
        (0.0, 0.5, "Expected a noise multiplier of 1e-100 to 1e+100, got 0.0."),
        (math.nan, 0.5, "Expected a noise multiplier of 1e-100 to 1e+100, got nan."),
        (1.0, 0.0, "Expected 0 < sampling_rate <= 1, got 0.0."),
        (1.0, 1.5, "Expected 0 < sampling_rate <= 1, got 1.5."),
    ],
)
def test_arguments_out_of_range_are_refused(z: float, q: float, message: str) -> None:
    """Whole messages."""
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        subsampled_gaussian(noise_multiplier=z, sampling_rate=q)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^Expected 0 < delta < 1, got 1\.$"):
        NOTHING.epsilon(delta=1)
    with pytest.raises(ValueError, match=r"^Expected a count of 0 or more, got -1\.$"):
        NOTHING.times(-1)
    with pytest.raises(ValueError, match=r"^Expected at least 1 step, got 0\.$"):
        noise_multiplier_for_steps(epsilon=1, delta=0.1, sampling_rate=1, steps=0, spent=NOTHING)
