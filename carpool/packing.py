"""A batch of token rows as the program takes it: without padding.

A definition, not an implementation: every device makes the same four arrays. For rows of token
ids, in order, with N ids in all, B rows and T slots (at least the longest row's length):

- ``token_ids`` (N): the rows' ids, one row after the other;
- ``token_rows`` (N): the row that each id is of, from 0;
- ``token_positions`` (N): its place in that row, from 0;
- ``slot_tokens`` (B, T): the place in ``token_ids`` of each row's ids, -1 behind its last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """The four arrays, int64; make them with ``pack``."""

    token_ids: NDArray[np.int64]
    token_rows: NDArray[np.int64]
    token_positions: NDArray[np.int64]
    slot_tokens: NDArray[np.int64]

    def named(self) -> dict[str, NDArray[np.int64]]:
        """By the names that the program's inputs have."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.slot_tokens.shape[0])


def pack(rows: Sequence[NDArray[np.int64]], *, min_length: int) -> PackedTokens:
    """The rows as defined at the top, with the fewest slots that the program takes.

    Args:
        rows: int64 ids, shape ``(tokens,)`` each; a row may be empty, not all of them.
        min_length: least T; the program's lower bound.
    """
    lengths = np.array([row.size for row in rows], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(max(min_length, int(lengths.max(initial=0))), dtype=np.int64)
    slot_tokens = np.where(places < lengths[:, None], starts[:, None] + places, np.int64(-1))
    token_rows = np.repeat(np.arange(len(rows), dtype=np.int64), lengths)
    return PackedTokens(
        token_ids=np.concatenate([*rows, np.zeros(0, dtype=np.int64)]),
        token_rows=token_rows,
        token_positions=np.arange(token_rows.size, dtype=np.int64) - starts[token_rows],
        slot_tokens=slot_tokens,
    )
