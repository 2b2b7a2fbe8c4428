"""The bound on a device's influence, as an inequality between integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from carpool.errors import UpdateRejected
from carpool_server.aggregation import Total
from carpool_server.privacy.clipping import clip_to_grid, grid_step

BOUND = 2**30


def squared_norm(values: np.ndarray) -> int:
    """In Python's integers, which do not overflow."""
    return sum(value * value for value in values.tolist())


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
updates = hnp.arrays(np.float32, st.integers(1, 40), elements=finite)
clips = st.floats(1e-6, 1e6)


@settings(max_examples=400, deadline=None)
@given(update=updates, clip_norm=clips)
def test_no_update_exceeds_the_bound(update: np.ndarray, clip_norm: float) -> None:
    """Denormal, huge, one coordinate, all equal: the squared norm is at most 2**60, exactly."""
    grid = clip_to_grid(update, clip_norm=clip_norm, device_id="a")
    assert grid.dtype == np.int64
    assert squared_norm(grid) <= BOUND * BOUND


@settings(max_examples=300, deadline=None)
@given(update=updates, clip_norm=clips, scale=st.floats(1 - 1e-6, 1 + 1e-6))
def test_no_update_about_as_long_as_the_bound_exceeds_it(
    update: np.ndarray, clip_norm: float, scale: float
) -> None:
    """At the edge, where rounding could tip it over."""
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if not 1e-30 < norm < 1e30:
        return
    edge = (update.astype(np.float64) * (clip_norm * scale / norm)).astype(np.float32)
    assert squared_norm(clip_to_grid(edge, clip_norm=clip_norm, device_id="a")) <= BOUND * BOUND


@pytest.mark.parametrize("num_values", [1, 31, 17_751, 377_472])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_long_updates_use_the_bound_they_have(num_values: int, size: float) -> None:
    """Clipped and not zeroed: the norm is below the bound by the margin and the rounding."""
    update = np.random.default_rng(1).standard_normal(num_values).astype(np.float32)
    grid = clip_to_grid(update * np.float32(size), clip_norm=1e-32, device_id="a")
    norm = math.isqrt(squared_norm(grid))
    assert BOUND * (1 - 2**-39) - math.sqrt(num_values) - 2 <= norm <= BOUND


def test_rounding_is_toward_zero_on_both_sides() -> None:
    """Within the bound, values are cut to whole grid units and never lengthened."""
    step = grid_step(1.0)
    update = np.array([2.75, -2.75, 0.99, -0.99, 3.0], dtype=np.float32) * np.float32(step)
    grid = clip_to_grid(update, clip_norm=1.0, device_id="a")
    assert grid.tolist() == [2, -2, 0, 0, 3]


def test_an_update_within_the_bound_keeps_its_values() -> None:
    """Off by less than one grid unit, toward zero."""
    update = np.random.default_rng(2).uniform(-0.01, 0.01, 100).astype(np.float32)
    grid = clip_to_grid(update, clip_norm=0.5, device_id="a")
    back = grid * grid_step(0.5)
    assert np.abs(back).max() <= np.abs(update).max()
    assert np.abs(back - update.astype(np.float64)).max() < grid_step(0.5) * (1 + 1e-9)


def test_a_clipped_update_keeps_its_direction() -> None:
    """Joint clipping scales all values by one factor (numpy's norm is the second opinion)."""
    update = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    grid = clip_to_grid(update, clip_norm=0.5, device_id="a") * grid_step(0.5)
    expected = update * (0.5 / np.linalg.norm(update.astype(np.float64)))
    np.testing.assert_allclose(grid, expected, atol=2 * grid_step(0.5))


def test_zero_stays_zero() -> None:
    """No division by the norm of nothing."""
    zero = np.zeros(5, dtype=np.float32)
    assert not clip_to_grid(zero, clip_norm=1.0, device_id="a").any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_updates_are_refused_and_named(bad: float) -> None:
    """The device's name stands in the message."""
    update = np.array([1.0, bad, bad], dtype=np.float32)
    with pytest.raises(UpdateRejected) as caught:
        clip_to_grid(update, clip_norm=1.0, device_id="phone-7")
    assert str(caught.value) == "device phone-7: expected finite values, got 2 non-finite of 3."
    assert caught.value.device_id == "phone-7"


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_the_clip_must_be_positive_and_finite(clip_norm: float) -> None:
    """A clip that silences or frees everybody is an error."""
    with pytest.raises(
        ValueError, match=r"^Expected clip_norm from 1e-35 to 1e\+35, got clip_norm="
    ):
        clip_to_grid(np.ones(2, dtype=np.float32), clip_norm=clip_norm, device_id="a")


@settings(max_examples=100, deadline=None)
@given(rows=hnp.arrays(np.float32, (6, 9), elements=finite), order=st.permutations(range(6)))
def test_the_sum_is_exact_and_knows_no_order(rows: np.ndarray, order: list[int]) -> None:
    """Any order and any grouping give the sum that Python's integers give."""
    grids = [clip_to_grid(row, clip_norm=1.0, device_id="a") for row in rows]
    first, second = (Total(num_values=9, capacity=6) for _ in range(2))
    for grid in grids:
        first.add(grid, count=1)
    second.add(grids[order[0]] + grids[order[1]], count=2)
    for place in order[2:]:
        second.add(grids[place], count=1)
    assert first.values.tolist() == second.values.tolist()
    assert first.values.tolist() == [sum(int(g[i]) for g in grids) for i in range(9)]
    assert first.count == second.count == 6


def test_a_cohort_whose_sum_could_overflow_is_refused() -> None:
    """2**33 devices of 2**30 each no longer fit."""
    Total(num_values=1, capacity=2**33 - 1)
    with pytest.raises(ValueError, match=r"^Expected a cohort whose sum fits 64 bits \(fewer than"):
        Total(num_values=1, capacity=2**33)


def test_a_total_refuses_more_than_its_capacity_and_other_shapes() -> None:
    """Its bound holds for what it was made for."""
    total = Total(num_values=2, capacity=1)
    with pytest.raises(ValueError, match=r"^Expected int64 of shape \(2,\), got int64 of \(3,\)"):
        total.add(np.zeros(3, dtype=np.int64), count=1)
    total.add(np.ones(2, dtype=np.int64), count=1)
    with pytest.raises(ValueError, match=r"^Expected at most 1 updates in all, got 2\.$"):
        total.add(np.ones(2, dtype=np.int64), count=1)
    assert total.values.tolist() == [1, 1]
