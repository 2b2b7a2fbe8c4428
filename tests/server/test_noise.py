"""The production sampler's distribution; every false alarm has probability below 1e-9."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from carpool import gaussian
from carpool.errors import PrivacyError
from carpool.gaussian import TAIL_PROBABILITY, discrete_gaussian, log_ratio_bound
from carpool_server.privacy.noise import gaussian_on_grid, noise_scale

COUNT = 200_000
FALSE_ALARM = 1e-9


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return gaussian_on_grid(COUNT, scale=noise_scale(0.7)) / (0.7 * 2**30)


def test_mean_and_variance_are_the_stated_ones(sample: np.ndarray) -> None:
    """Within 6.1 standard errors of 0 and 1: a false alarm has probability 1e-9 each."""
    assert abs(sample.mean()) < 6.1 / math.sqrt(COUNT)
    assert abs(np.square(sample).mean() - 1) < 6.1 * math.sqrt(2 / COUNT)


def test_the_distribution_is_the_normal_one(sample: np.ndarray) -> None:
    """Kolmogorov-Smirnov against scipy's normal distribution."""
    assert stats.kstest(sample, "norm").pvalue > FALSE_ALARM


def test_neighbours_and_halves_are_uncorrelated(sample: np.ndarray) -> None:
    """Values, and their sizes, one after the other and far apart."""
    half = COUNT // 2
    first, second = sample[:half], sample[half:]
    for a, b in ((first, second), (first**2, second**2), (sample[:-1], sample[1:])):
        assert stats.pearsonr(a, b).pvalue > FALSE_ALARM


@pytest.mark.parametrize("scale", [1, 2, 7])
def test_small_scales_are_the_discrete_gaussian(scale: int) -> None:
    """Where single integers can be counted: chi-squared against ``exp(-n**2 / (2 scale**2))``."""
    values = gaussian._sample(1_000_000, scale=scale)
    integers = np.arange(-6 * scale, 6 * scale + 1)
    expected = np.exp(-(integers**2) / (2 * scale**2))
    expected *= values.size / expected.sum()
    places = np.clip(values, integers[0], integers[-1]) + 6 * scale
    counts = np.bincount(places, minlength=integers.size)
    common = expected >= 10
    observed = [*counts[common], values.size - counts[common].sum()]
    wanted = [*expected[common], values.size - expected[common].sum()]
    assert stats.chisquare(observed, wanted).pvalue > FALSE_ALARM


def test_low_bits_of_large_scales_are_uniform() -> None:
    """The last ten bits of values around 2**30: what a float64 sampler gets wrong first."""
    low = discrete_gaussian(COUNT, scale=2**30) & 1023
    assert stats.chisquare(np.bincount(low, minlength=1024)).pvalue > FALSE_ALARM


def test_it_is_the_noise_of_opendp() -> None:
    """Two-sample test against opendp's exact discrete Gaussian, 20,000 values each."""
    import opendp.prelude as dp  # noqa: PLC0415  seconds, and only here

    dp.enable_features("contrib")
    scale = 2**20
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    measure = dp.m.make_gaussian(*space, scale=float(scale))
    theirs = np.array(measure([0] * 20_000))
    ours = discrete_gaussian(20_000, scale=scale)
    assert stats.ks_2samp(ours, theirs).pvalue > FALSE_ALARM
    assert abs(theirs.std() / scale - 1) < 6.1 / math.sqrt(2 * 20_000)


def exact_thresholds() -> list[int]:
    """``2**128 * P(k <= i)`` in 80 decimal digits."""
    with mpmath.workdps(80):
        weights = [mpmath.exp(-mpmath.mpf(k * k) / 2) for k in range(11)]
        total = mpmath.fsum(weights)
        return [int(mpmath.nint(2**128 * mpmath.fsum(weights[: k + 1]) / total)) for k in range(10)]


def test_the_steps_probabilities_are_those_of_mpmath() -> None:
    """To the last of 128 bits."""
    assert exact_thresholds() == gaussian._THRESHOLDS


class Words:
    """A source of prepared 64-bit words, in the order in which they are asked for."""

    def __init__(self, *arrays: list[int]) -> None:
        self._arrays: Iterator[list[int]] = iter(arrays)

    def __call__(self, size: int) -> bytes:
        """The next array's bytes."""
        array = np.array(next(self._arrays), dtype=np.uint64)
        assert array.nbytes == size
        return array.tobytes()


def drawn(monkeypatch: pytest.MonkeyPatch, *arrays: list[int], scale: int = 2**20) -> list[int]:
    monkeypatch.setattr(os, "urandom", Words(*arrays))
    found: list[int] = gaussian._accepted(len(arrays[0]), scale=scale).tolist()
    monkeypatch.undo()
    return found


def test_words_at_a_thresholds_edge_are_decided_by_their_lower_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tie in the upper 64 bits is settled by 64 more; offset 0 and coin 2 are accepted."""
    for place in (0, 3):
        threshold = gaussian._THRESHOLDS[place]
        high, low = threshold >> 64, threshold & (2**64 - 1)
        for lower, step in ((low - 1, place), (low, place + 1)):
            assert drawn(monkeypatch, [high], [lower], [0], [2]) == [step * 2**20]
        assert drawn(monkeypatch, [high - 1], [0], [2]) == [place * 2**20]
        assert drawn(monkeypatch, [high + 1], [0], [2]) == [(place + 1) * 2**20]


def test_a_negative_zero_and_biased_words_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 0 is not twice as likely, and no offset likelier than another."""
    scale = 3 * 2**20
    last = 2**64 // scale * scale - 1  # the last word that is as likely as every other one
    found = drawn(monkeypatch, [0] * 4, [0, 0, last, last + 1], [0, 1, 0, 0], scale=scale)
    assert found == [0, scale - 1]


def test_acceptance_is_the_stated_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least coin that is refused, against mpmath, far closer than the bound needs."""
    scale, step = 2**40, 3
    high = (gaussian._THRESHOLDS[step - 1] >> 64) + 1
    for offset in (1, 2**20, 2**39 + 12345, 2**40 - 1):
        with mpmath.workdps(50):
            x = mpmath.mpf(offset) / scale
            exact = mpmath.exp(-x * (2 * step + x) / 2) * 2**63
        slack = int(exact * 2.0**-46) + 1
        for coin, taken in ((int(exact) - slack, True), (int(exact) + slack, False)):
            found = drawn(monkeypatch, [high], [offset], [coin << 1], scale=scale)
            assert found == ([step * scale + offset] if taken else [])


def test_the_stated_ratio_covers_discrete_against_rounded() -> None:
    """At a scale small enough to see: exact probabilities within the ``6 / scale**2`` claimed."""
    scale = 12
    with mpmath.workdps(60):
        weights = {n: mpmath.exp(-mpmath.mpf(n * n) / (2 * scale**2)) for n in range(-132, 133)}
        total = mpmath.fsum(weights.values())
        worst = 0
        for n in range(-131, 132):
            edges = [mpmath.mpf(n) + side * mpmath.mpf(1) / 2 for side in (-1, 1)]
            low, high = (mpmath.ncdf(edge / scale) for edge in edges)
            worst = max(worst, abs(mpmath.log((weights[n] / total) / (high - low))))
    assert 0.5 / scale**2 < worst < 6 / scale**2
    assert log_ratio_bound(2**30) == 2.0**-45 + Fraction(6, 2**60)


def test_the_stated_tail_is_that_of_the_normal_distribution() -> None:
    """Beyond 11 standard deviations."""
    assert 0.9 * TAIL_PROBABILITY < math.erfc(11 / math.sqrt(2)) < TAIL_PROBABILITY


@pytest.mark.parametrize("num_values", [0, 1, 2, 7])
def test_any_number_of_values(num_values: int) -> None:
    """None and odd lengths too."""
    values = gaussian_on_grid(num_values, scale=2**30)
    assert values.shape == (num_values,)
    assert values.dtype == np.int64


def test_two_draws_differ_even_with_numpy_seeded() -> None:
    """There is nothing to seed."""
    draws = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  the point is that it changes nothing
        draws.append(gaussian_on_grid(50, scale=2**30))
    assert (draws[0] != draws[1]).all()
    assert list(inspect.signature(gaussian_on_grid).parameters) == ["num_values", "scale"]
    assert list(inspect.signature(discrete_gaussian).parameters) == ["count", "scale"]


def test_every_bit_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's source fixed, the noise is: nothing else goes in."""
    words = os.urandom(8 * 10_000)
    monkeypatch.setattr(os, "urandom", lambda size: words[:size])
    first, second = (gaussian_on_grid(300, scale=2**30) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_no_noise_is_zero_and_takes_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode none is the same path."""
    monkeypatch.setattr(os, "urandom", None)
    assert noise_scale(0.0) == 0
    assert not gaussian_on_grid(5, scale=0).any()


def test_the_scale_is_rounded_up() -> None:
    """Never less noise than was charged."""
    assert noise_scale(0.3) == math.ceil(Fraction(0.3) * 2**30)
    assert noise_scale(1.0) == 2**30


@pytest.mark.parametrize("multiplier", [-1.0, math.nan, math.inf, 1e9, 1e-6])
def test_multipliers_that_cannot_be_are_refused(multiplier: float) -> None:
    """Noise that would overflow the sum, or whose error could not be stated, is refused."""
    with pytest.raises(PrivacyError) as caught:
        noise_scale(multiplier)
    assert str(caught.value) == (
        f"expected a noise multiplier of 0, or from 6.1e-05 to 1048576, got {multiplier}."
    )


def test_scales_that_cannot_be_are_refused() -> None:
    """Named with what was expected."""
    message = rf"^Expected a standard deviation of {2**16} to {2**58} integers, got 65535\.$"
    with pytest.raises(ValueError, match=message):
        discrete_gaussian(1, scale=2**16 - 1)
