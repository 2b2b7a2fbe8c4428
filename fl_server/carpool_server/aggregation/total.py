"""The exact sum of a cohort's updates.

On the grid sensitivity is an integer inequality and a sum is independent of order, split and
transport, so both can be tested as equalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from carpool.protocol import GRID_BOUND, Block

_INT64_BOUND = 1 << 63


def blocks_of(
    values: NDArray[np.int64], sizes: Mapping[Block, int]
) -> dict[Block, NDArray[np.int64]]:
    """A sum's blocks by name, as views, in the order of ``TaskHeader.blocks``."""
    ends = list(accumulate(sizes.values()))
    starts = [0, *ends[:-1]]
    return {name: values[a:b] for name, a, b in zip(sizes, starts, ends, strict=True)}


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
        self.make_room(count)
        self.values += part
        self.count += count

    def make_room(self, count: int) -> None:
        """Raises a ValueError if ``count`` updates more would be too many."""
        if self.count + count > self._capacity:
            raise ValueError(
                f"Expected at most {self._capacity} updates in all, got {self.count + count}."
            )
