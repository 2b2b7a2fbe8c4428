"""One Gaussian mechanism over blocks: its price, its shares, and what follows the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from carpool.errors import PrivacyError
from carpool.privacy import AdaptiveClip, MetricBounds, PrivacyConfig
from carpool.protocol import GRID_BOUND, block_sizes
from carpool_server.privacy.mechanism import Mechanism, bit_noise, mechanism_for, next_clip
from carpool_server.privacy.metrics import decode_metrics, encode_metrics
from carpool_server.privacy.noise import gaussian_on_grid

COHORT = 100.0


def config(**changes: object) -> PrivacyConfig:
    values = {
        "mode": "central",
        "clip_norm": 0.5,
        "epsilon": 8.0,
        "delta": 1e-5,
        "regime": "poisson",
        **changes,
    }
    return PrivacyConfig.model_validate(values)


def mechanism(z: float = 1.0, *, cohort: float = COHORT, **changes: object) -> Mechanism:
    privacy = config(**changes)
    sizes = block_sizes(500, norm_bit=privacy.adaptive_clip is not None, metrics=privacy.metrics)
    return mechanism_for(privacy, noise_multiplier=z, sizes=sizes, expected_size=cohort)


def test_theta_alone_has_the_stated_noise() -> None:
    """Up to whole grid units, upward."""
    alone = mechanism(0.7)
    assert alone.scales == {"theta": math.ceil(0.7 * GRID_BOUND)}
    assert 0.7 <= alone.noise_multiplier < 0.7 * (1 + 1e-9)


@pytest.mark.parametrize("z", [0.4, 1.0, 5.0])
def test_all_blocks_together_cost_the_stated_multiplier(z: float) -> None:
    """Theta gets more noise, so that bit and metrics are paid for (Andrew et al., theorem 1)."""
    both = mechanism(z, adaptive_clip={"bit_noise": 20.0}, metrics={"budget_share": 0.05})
    assert list(both.sizes) == ["theta", "norm_bit", "metrics"]
    bit, metrics = both.multiplier("norm_bit"), both.multiplier("metrics")
    assert bit == pytest.approx(2 * 20.0, rel=1e-8)  # the bit's sensitivity is one half
    assert metrics == pytest.approx(z / math.sqrt(0.05), rel=1e-8)
    expected = (z**-2 - (2 * 20.0) ** -2 - 0.05 * z**-2) ** -0.5
    assert both.multiplier("theta") == pytest.approx(expected, rel=1e-8)
    assert z <= both.noise_multiplier < z * (1 + 1e-8)


def test_one_devices_vector_over_the_noise_is_as_long_as_it_costs() -> None:
    """The longest device: every block at its bound; divided by the noise its norm is 1 / z."""
    both = mechanism(1.3, adaptive_clip={}, metrics={})
    shares = [GRID_BOUND / both.scales[block] for block in both.sizes]
    assert math.hypot(*shares) == pytest.approx(1 / both.noise_multiplier, rel=1e-12)


def test_bits_that_take_all_of_the_budget_are_refused() -> None:
    """At 0.1 bits of noise nothing would be left for theta."""
    with pytest.raises(PrivacyError) as caught:
        mechanism(1.0, adaptive_clip={"bit_noise": 0.1})
    assert str(caught.value) == (
        "privacy: norm bit and metrics would cost as much as a noise multiplier of 0.2 does, and "
        "all is 1: nothing is left for theta. Raise adaptive_clip.bit_noise or lower "
        "metrics.budget_share."
    )


def test_every_block_gets_noise_of_its_own_size() -> None:
    """Sample deviations over many draws, within 6.1 standard errors."""
    both = mechanism(0.8, adaptive_clip={"bit_noise": 5.0}, metrics={"budget_share": 0.2})
    draws = np.array([both.noise() for _ in range(4000)], dtype=np.float64)
    ends = np.cumsum([0, *both.sizes.values()])
    for block, start, end in zip(both.sizes, ends[:-1], ends[1:], strict=True):
        part = draws[:, start:end] / both.scales[block]
        assert abs(np.square(part).mean() - 1) < 6.1 * math.sqrt(2 / part.size), block


def test_without_noise_the_sum_stays_as_it_is() -> None:
    """Mode none: the same path."""
    silent = mechanism(0.0, mode="none", epsilon=None, delta=None, regime=None)
    assert silent.noise_multiplier == 0
    assert not silent.noise().any()


def test_a_projection_has_the_noise_of_its_imagined_cohort() -> None:
    """50 devices under the noise that 5,000 would share: a hundredth on the sum."""
    imagined = mechanism(
        1.2,
        cohort=50.0,
        mode="projection",
        regime=None,
        projection={"population": 80_000, "cohort": 5_000},
    )
    assert imagined.multiplier("theta") == pytest.approx(1.2 / 100, rel=1e-6)


def test_the_bits_noise_is_a_twentieth_of_the_cohort_by_default() -> None:
    """Andrew et al. (2021), section 3; more where that would cost over a tenth of the budget."""
    assert bit_noise(AdaptiveClip(), 60.0, noise_multiplier=1.0) == 3.0
    assert bit_noise(AdaptiveClip(bit_noise=7.0), 60.0, noise_multiplier=1.0) == 7.0
    small = mechanism(1.0, cohort=4.0, adaptive_clip={})
    assert small.multiplier("norm_bit") ** -2 == pytest.approx(0.1, rel=1e-6)


def follow(norms: np.ndarray, *, start: float, rounds: int, adaptive: AdaptiveClip) -> float:
    """The clip after some rounds over devices with the given norms, with the production noise."""
    clip, scale = start, math.ceil(norms.size / 10 * GRID_BOUND)
    for _ in range(rounds):
        bits = int(np.where(norms <= clip, 1, -1).sum()) * GRID_BOUND
        noised = bits + int(gaussian_on_grid(1, scale=scale)[0])
        clip = next_clip(clip, noised_bits=noised, config=adaptive, expected_size=norms.size)
    return clip


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_finds_the_quantile_from_above_and_below(start: float, quantile: float) -> None:
    """Log-normal norms; Flower's wrappers run away from it (the bit or the rule inverted)."""
    norms = np.exp(np.random.default_rng(4).standard_normal(1000))
    adaptive = AdaptiveClip(target_quantile=quantile, learning_rate=0.5)
    clip = follow(norms, start=start, rounds=150, adaptive=adaptive)
    share = float(np.mean(norms <= clip))
    # each step's noise is 0.05 of a share: 6.1 of its deviations around the fixed point
    assert abs(share - quantile) < 0.2


def test_one_step_of_the_clip_is_the_papers() -> None:
    """C exp(-rate (share - target)), with the share over the fixed cohort."""
    adaptive = AdaptiveClip(target_quantile=0.3, learning_rate=0.2)
    # 70 of 100 devices replied, 60 within and 10 beyond: the sum of (bit - 1/2) is 25
    noised = (60 - 10) * GRID_BOUND
    found = next_clip(2.0, noised_bits=noised, config=adaptive, expected_size=100.0)
    assert found == pytest.approx(2.0 * math.exp(-0.2 * (0.75 - 0.3)), rel=1e-12)


def test_a_noisy_share_never_leaves_its_range() -> None:
    """A step is at most the rate, however large the noise."""
    for noised in (-(2**60), 2**60):
        found = next_clip(1.0, noised_bits=noised, config=AdaptiveClip(), expected_size=10.0)
        assert math.exp(-0.2) <= found <= math.exp(0.2)


BOUNDS = MetricBounds(max_loss=10.0, max_examples=32)


def test_metrics_without_noise_are_the_means() -> None:
    """Of three devices, within the grid's rounding."""
    rows = [(2.0, 0.25, 8), (4.0, 0.75, 16), (3.0, 0.5, 32)]
    total = sum(
        encode_metrics(loss=loss, hit_at_1=hit, examples=count, bounds=BOUNDS)
        for loss, hit, count in rows
    )
    found = decode_metrics(np.asarray(total), noise_multiplier=0.0, bounds=BOUNDS)
    assert found.contributors == pytest.approx(3.0)
    assert found.loss == pytest.approx(3.0, abs=1e-7)
    assert found.hit_at_1 == pytest.approx(0.5, abs=1e-8)
    assert found.examples == pytest.approx(56 / 3, abs=1e-6)
    assert found.noise == 0.0


def test_metrics_lost_in_noise_are_not_told() -> None:
    """Two contributors under noise of ten: no mean is stated."""
    total = 2 * encode_metrics(loss=2.0, hit_at_1=0.5, examples=4, bounds=BOUNDS)
    found = decode_metrics(total, noise_multiplier=5.0, bounds=BOUNDS)
    assert (found.loss, found.hit_at_1, found.examples) == (None, None, None)
    assert found.noise == 10.0
