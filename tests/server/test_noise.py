"""The production sampler's distribution; every false alarm has probability below 1e-9."""

from __future__ import annotations

import inspect
import math
import os

import numpy as np
import pytest
from scipy import stats

from carpool_server.privacy import gaussian_on_grid, noise

COUNT = 200_000


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return gaussian_on_grid(COUNT, noise_multiplier=0.7) / (0.7 * 2**30)


def test_mean_and_variance_are_the_stated_ones(sample: np.ndarray) -> None:
    """Within 6.1 standard errors of 0 and 1: a false alarm has probability 1e-9 each."""
    assert abs(sample.mean()) < 6.1 / math.sqrt(COUNT)
    assert abs(np.square(sample).mean() - 1) < 6.1 * math.sqrt(2 / COUNT)


def test_the_distribution_is_the_normal_one(sample: np.ndarray) -> None:
    """Kolmogorov-Smirnov against scipy's normal distribution."""
    assert stats.kstest(sample, "norm").pvalue > 1e-9


def test_neighbours_and_halves_are_uncorrelated(sample: np.ndarray) -> None:
    """Box-Muller makes pairs: the two halves share radii, and must still be independent."""
    half = COUNT // 2
    first, second = sample[:half], sample[half:]
    for a, b in ((first, second), (first**2, second**2), (sample[:-1], sample[1:])):
        assert stats.pearsonr(a, b).pvalue > 1e-9


@pytest.mark.parametrize("num_values", [0, 1, 2, 7])
def test_any_number_of_values(num_values: int) -> None:
    """Odd lengths too."""
    values = gaussian_on_grid(num_values, noise_multiplier=1.0)
    assert values.shape == (num_values,)
    assert values.dtype == np.int64


def test_two_draws_differ_even_with_numpy_seeded() -> None:
    """There is nothing to seed."""
    draws = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  the point is that it changes nothing
        draws.append(gaussian_on_grid(50, noise_multiplier=1.0))
    assert (draws[0] != draws[1]).all()
    assert list(inspect.signature(gaussian_on_grid).parameters) == [
        "num_values",
        "noise_multiplier",
    ]


def test_every_bit_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's source fixed, the noise is: nothing else goes in."""
    monkeypatch.setattr(
        noise.os, "urandom", lambda size: (bytes(range(256)) * (size // 256 + 1))[:size]
    )
    first, second = (gaussian_on_grid(300, noise_multiplier=1.0) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_extreme_words_give_finite_values(monkeypatch: pytest.MonkeyPatch, byte: bytes) -> None:
    """All bits 0: the longest radius. All bits 1: radius 0."""
    monkeypatch.setattr(noise.os, "urandom", lambda size: byte * size)
    values = gaussian_on_grid(2, noise_multiplier=1.0)
    longest = math.sqrt(2 * 64 * math.log(2)) * 2**30
    assert values.tolist() == ([round(longest), 0] if byte == b"\x00" else [0, 0])


def test_no_noise_is_zero_and_takes_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode none is the same path."""
    monkeypatch.setattr(os, "urandom", None)
    assert not gaussian_on_grid(5, noise_multiplier=0.0).any()


@pytest.mark.parametrize("multiplier", [-1.0, math.nan, math.inf, 1e9])
def test_multipliers_that_cannot_be_are_refused(multiplier: float) -> None:
    """Noise that would overflow the sum is refused, not wrapped."""
    with pytest.raises(ValueError, match=r"^Expected a noise multiplier from 0 to about 1139"):
        gaussian_on_grid(2, noise_multiplier=multiplier)
