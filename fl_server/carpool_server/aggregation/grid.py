"""Updates on an integer grid: clipped, rounded toward zero, and added exactly.

On the grid sensitivity is an integer inequality and a sum is independent of order, split and
transport, so both can be tested as equalities.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carpool.errors import UpdateRejected
from carpool.protocol import GRID_BITS

GRID_BOUND = 1 << GRID_BITS
"""The L2 bound on one device's update, in grid units."""

_MARGIN = 2.0**-40
"""Share of the bound left free: far more than float64 can be off over any theta's length."""

_INT64_BOUND = 1 << 63


def grid_step(clip_norm: float) -> float:
    """One grid unit in theta's units: ``clip_norm * 2**-GRID_BITS``, exact in float64."""
    return math.ldexp(clip_norm, -GRID_BITS)


def clip_to_grid(
    update: NDArray[np.float32], *, clip_norm: float, device_id: str
) -> NDArray[np.int64]:
    """Clips an update jointly over theta and puts it on the integer grid.

    Guarantees: the L2 norm of the result is at most ``2**GRID_BITS`` grid units, that is
    ``clip_norm``, exactly (an inequality between integers, without slack), whatever finite
    values come in. An update whose norm is at most ``clip_norm * (1 - 2**-40)`` is not scaled,
    only rounded: each value moves toward zero by less than one grid unit (plus two float64
    roundings).

    How: norm and scaling are float64; the pairwise sum of squares is off by less than 2**-46
    of itself for up to 2**32 values, the scaling by less than 2**-50, and the margin of 2**-40
    covers both. Rounding toward zero never lengthens.

    Args:
        update: float32, shape ``(num_values,)``: theta after minus theta before.
        clip_norm: C, positive and finite, in theta's units.
        device_id: used only in error messages.

    Returns:
        int64, shape ``(num_values,)``, in grid units (``grid_step``).

    Raises:
        ValueError: ``clip_norm`` is not positive and finite.
        UpdateRejected: the update has a NaN or an infinity.

    Source: joint clipping as in McMahan et al. (2018), arXiv 1710.06963; the integer grid
    against floating-point attacks on sensitivity, as in Mironov (2012),
    doi 10.1145/2382196.2382264.
    """
    if not 0 < clip_norm < math.inf:
        raise ValueError(f"Expected clip_norm positive and finite, got {clip_norm=}.")
    bad = int(np.count_nonzero(~np.isfinite(update)))
    if bad:
        raise UpdateRejected(
            f"expected finite values, got {bad} non-finite of {update.size}.", device_id=device_id
        )
    values = update.astype(np.float64)
    norm = math.sqrt(float(np.sum(np.square(values))))
    if norm == 0:
        return np.zeros(update.shape, dtype=np.int64)
    shortest = clip_norm * (1 - _MARGIN)
    factor = GRID_BOUND * (1 - _MARGIN) / norm if norm > shortest else GRID_BOUND / clip_norm
    np.multiply(values, factor, out=values)
    return values.astype(np.int64)  # a cast to integers rounds toward zero


class Total:
    """The exact sum of at most ``capacity`` updates in grid units.

    Guarantees: no addition can overflow, because ``capacity * 2**GRID_BITS`` fits int64 and
    every part is within its own count's bound.

    Attributes:
        values: int64, shape ``(num_values,)``, in grid units.
        count: how many updates are in.

    Raises:
        ValueError: a capacity whose bound does not fit int64, or a part that does not fit.
    """

    def __init__(self, *, num_values: int, capacity: int) -> None:
        if capacity * GRID_BOUND >= _INT64_BOUND:
            raise ValueError(
                f"Expected a cohort whose sum fits 64 bits (fewer than "
                f"{_INT64_BOUND // GRID_BOUND} devices), got {capacity}."
            )
        self.values: NDArray[np.int64] = np.zeros(num_values, dtype=np.int64)
        self.count = 0
        self._capacity = capacity

    def add(self, part: NDArray[np.int64], *, count: int) -> None:
        """Adds the sum of ``count`` updates, each within the grid's bound."""
        if part.shape != self.values.shape or part.dtype != np.int64:
            raise ValueError(
                f"Expected int64 of shape {self.values.shape}, got {part.dtype} of {part.shape}."
            )
        if self.count + count > self._capacity:
            raise ValueError(
                f"Expected at most {self._capacity} updates in all, got {self.count + count}."
            )
        self.values += part
        self.count += count
