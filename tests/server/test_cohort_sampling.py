"""Who is drawn: independently, with the stated probability, whatever the order."""

from __future__ import annotations

import math

import pytest

from carpool.errors import ConfigError
from carpool_server.sampling import PoissonSampler, derived_key, sampling_rate

NAMES = [f"client {n}" for n in range(801)]


def test_equal_keys_draw_equal_cohorts_in_any_order() -> None:
    """A round that is done again asks the same devices."""
    sampler = PoissonSampler(rate=0.1, key=b"k")
    first = sampler.draw(NAMES, round_number=3)
    assert first == sampler.draw(reversed(NAMES), round_number=3)
    assert list(first) == sorted(first)


def test_rounds_and_keys_draw_different_cohorts() -> None:
    """No round repeats another, and a secret key says nothing with another key."""
    sampler = PoissonSampler(rate=0.1, key=b"k")
    cohorts = {sampler.draw(NAMES, round_number=n) for n in range(1, 6)}
    cohorts.add(PoissonSampler(rate=0.1, key=b"l").draw(NAMES, round_number=1))
    assert len(cohorts) == 6


def test_cohort_sizes_are_binomial() -> None:
    """Mean and variance over 300 rounds, within 6.1 standard errors."""
    q, rounds = 50 / 801, 300
    sampler = PoissonSampler(rate=q, key=b"sizes")
    sizes = [len(sampler.draw(NAMES, round_number=n)) for n in range(rounds)]
    mean, variance = 801 * q, 801 * q * (1 - q)
    found = sum(sizes) / rounds
    assert abs(found - mean) < 6.1 * math.sqrt(variance / rounds)
    spread = sum((size - mean) ** 2 for size in sizes) / rounds
    assert abs(spread - variance) < 6.1 * variance * math.sqrt(2 / rounds)


def test_each_device_is_drawn_as_often_as_any_other() -> None:
    """No device is favoured: each count within 6.1 standard deviations of its mean."""
    sampler = PoissonSampler(rate=0.25, key=b"fair")
    counts = dict.fromkeys(NAMES[:100], 0)
    for number in range(400):
        for name in sampler.draw(NAMES[:100], round_number=number):
            counts[name] += 1
    limit = 6.1 * math.sqrt(400 * 0.25 * 0.75)
    assert all(abs(count - 100) < limit for count in counts.values())


def test_a_rate_of_one_draws_everybody() -> None:
    """The end of the range."""
    assert PoissonSampler(rate=1.0, key=b"").draw(NAMES, round_number=1) == tuple(sorted(NAMES))


def test_a_cohort_larger_than_the_population_is_refused_by_both_numbers() -> None:
    """A probability above 1 would silently become less than was asked for."""
    assert sampling_rate(expected_size=50, population=50) == 1.0
    with pytest.raises(ConfigError) as caught:
        sampling_rate(expected_size=51, population=50)
    assert str(caught.value) == (
        "cohort.expected_size: expected at most the population of 50 devices, got 51. "
        "Lower it, or bring more devices."
    )


def test_keys_of_different_purposes_differ() -> None:
    """The order of examples says nothing about the cohorts."""
    keys = {derived_key(seed, purpose=p) for seed in (1, 2) for p in ("a", "b")}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}
