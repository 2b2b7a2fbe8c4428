"""Clipping onto an integer grid: where one device's influence gets its bound."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carpool.errors import UpdateRejected
from carpool.privacy import LARGEST_CLIP, SMALLEST_CLIP
from carpool.protocol import GRID_BITS, GRID_BOUND

_MARGIN = 2.0**-40
"""Share of the bound left free, for what float64 can be off."""

_NORM_BLOCK = 8192
"""Values squared at a time: a BLAS uses one thread for so few, and the error stays as stated."""

_BLOCK = 1 << 15
"""Values put on the grid at a time: they stay in the caches."""


def grid_step(clip_norm: float) -> float:
    """One grid unit in theta's units: ``clip_norm * 2**-GRID_BITS``, exact in float64."""
    return math.ldexp(clip_norm, -GRID_BITS)


def clip_onto(
    total: NDArray[np.int64], update: NDArray[np.float32], *, clip_norm: float, device_id: str
) -> float:
    """Clips an update jointly over theta, puts it on the integer grid, and adds it to a sum.

    Guarantees: what is added has an L2 norm of at most ``2**GRID_BITS`` grid units, that is
    ``clip_norm``, exactly (an inequality between integers, without slack), whatever finite
    values come in; so one update more or less, or one that becomes zero, moves the sum by at
    most ``clip_norm``. An update whose norm is at most ``clip_norm * (1 - 2**-40)`` is not
    scaled, only rounded: each value moves toward zero by less than one grid unit (plus two
    float64 roundings). A refused update adds nothing. That the sum itself fits 64 bits is
    ``aggregation.Total``'s to see to.

    How: norm and scaling are float64. A sum of 8192 squares is off by at most 2**-40 of itself
    in any order, the sum over blocks is rounded once, so the norm is off by less than 2**-40.9,
    the scaling by 2**-50, and the margin of 2**-40 covers both. Rounding toward zero never
    lengthens.

    Args:
        total: int64, same shape, in grid units; changed in place.
        update: float32, shape ``(num_values,)``: theta after minus theta before.
        clip_norm: C, 1e-35 to 1e35, in theta's units.
        device_id: used only in error messages.

    Returns:
        The update's own L2 norm, in theta's units.

    Raises:
        ValueError: ``clip_norm`` is out of range, or the shapes differ.
        UpdateRejected: the update has a NaN or an infinity.

    Source: joint clipping as in McMahan et al. (2018), arXiv 1710.06963; the integer grid
    against floating-point attacks on sensitivity, as in Mironov (2012),
    doi 10.1145/2382196.2382264.
    """
    if not SMALLEST_CLIP <= clip_norm <= LARGEST_CLIP:
        raise ValueError(
            f"Expected clip_norm from {SMALLEST_CLIP} to {LARGEST_CLIP}, got {clip_norm=}."
        )
    if total.shape != update.shape or update.dtype != np.float32:
        raise ValueError(
            f"Expected a float32 update of shape {total.shape}, got {update.dtype} of "
            f"{update.shape}."
        )
    norm = _norm(update)
    if not math.isfinite(norm):
        bad = int(np.count_nonzero(~np.isfinite(update)))
        raise UpdateRejected(
            f"expected finite values, got {bad} non-finite of {update.size}.", device_id=device_id
        )
    within = norm <= clip_norm * (1 - _MARGIN)
    factor = GRID_BOUND / clip_norm if within else GRID_BOUND * (1 - _MARGIN) / norm
    wide = np.empty(min(_BLOCK, update.size))
    whole = np.empty(wide.shape, dtype=np.int64)
    for start in range(0, update.size, _BLOCK):
        part = update[start : start + _BLOCK]
        scaled, cut = wide[: part.size], whole[: part.size]
        scaled[:] = part
        scaled *= factor
        np.copyto(cut, scaled, casting="unsafe")  # a cast to integers rounds toward zero
        total[start : start + _BLOCK] += cut
    return norm


def clip_to_grid(
    update: NDArray[np.float32], *, clip_norm: float, device_id: str
) -> NDArray[np.int64]:
    """One clipped update by itself, int64 in grid units; all else as for ``clip_onto``."""
    alone = np.zeros(update.shape, dtype=np.int64)
    clip_onto(alone, update, clip_norm=clip_norm, device_id=device_id)
    return alone


def _norm(update: NDArray[np.float32]) -> float:
    """Not finite where a value is not; squares of float32 values cannot overflow float64."""
    squares = []
    wide = np.empty(min(_NORM_BLOCK, update.size))
    with np.errstate(invalid="ignore"):
        for start in range(0, update.size, _NORM_BLOCK):
            part = update[start : start + _NORM_BLOCK]
            block = wide[: part.size]
            block[:] = part
            squares.append(float(np.dot(block, block)))
    return math.sqrt(math.fsum(squares))
