"""The coordinator's loop over an in-process grid."""

from __future__ import annotations

import math

import fake_farm
import numpy as np
import pytest
from fake_farm import FakeAggregator, dealt
from round_kit import RunHere, Witness, settings


def honest(count: int = 30, *, parts: int = 2) -> dict[int, FakeAggregator]:
    return {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(count, parts=parts))}


def test_theta_follows_the_settings_by_hand(run_here: RunHere) -> None:
    """Three rounds equal the sums, the fixed denominator and FedAdam written out with floats."""
    witness = Witness()
    config = settings()
    result = run_here(honest(), config=config, audit=witness)
    theta = [np.float32(0)] * fake_farm.NUM_VALUES
    m, v = [0.0] * len(theta), [1e-8] * len(theta)
    for number, rate in ((1, 0.03), (2, 0.03 * 2 / 2.5), (3, 0.03 * 1 / 2.5)):
        for i, units in enumerate(witness.sums[number].tolist()):
            mean = units * (0.5 / 2**30) / 12.0
            m[i] = 0.9 * m[i] + 0.1 * mean
            v[i] = 0.99 * v[i] + 0.01 * mean * mean
            theta[i] = np.float32(float(theta[i]) + rate * m[i] / (math.sqrt(v[i]) + 1e-4))
    np.testing.assert_allclose(result.theta, np.array(theta), rtol=1e-6, atol=1e-9)
    assert np.abs(result.theta).max() > 0.01


@pytest.mark.parametrize("parts", [1, 5])
def test_the_split_over_aggregators_changes_no_bit(run_here: RunHere, parts: int) -> None:
    """1 and 5 aggregators release the very theta of 2, from equal sums."""
    first, second = Witness(), Witness()
    two = run_here(honest(parts=2), out="two", audit=first)
    other = run_here(honest(parts=parts), out="other", audit=second)
    assert two.theta.tobytes() == other.theta.tobytes()
    assert first.devices == second.devices
    for number, total in first.sums.items():
        np.testing.assert_array_equal(total, second.sums[number])
