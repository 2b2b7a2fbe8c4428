"""Ranks and what is computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from carpool.errors import DeviceError

_CUTOFF = 10

Metric = Literal["acc@1", "MRR@10", "recall@10"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Where a system put the right document of each query.

    Attributes:
        ranks: int64, shape ``(Q,)``; 1 is the top.
        client: int64, shape ``(Q,)``: the query's client, as a place in ``clients``.
        clients: names; each has at least one query.
    """

    ranks: NDArray[np.int64]
    client: NDArray[np.int64]
    clients: tuple[str, ...]


def ranks_of(scores: NDArray[np.float32], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 1-based rank of each query's right document.

    Equal scores stand in the catalogue's order, as in the list that ``search`` shows. So the
    rank is 1 + the documents with a higher score + the earlier ones with an equal score. (To
    count ties against a system would be unfair to BM25 alone, which has many.)

    Args:
        scores: float, shape ``(Q, N)``; the higher, the better.
        right: int64, shape ``(Q,)``: the right document's place.

    Returns:
        int64, shape ``(Q,)``, from 1 to N.

    Raises:
        DeviceError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise DeviceError(f"expected scores, got {int(np.isnan(scores).sum())} NaN among them.")
    of_right = np.take_along_axis(scores, right[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None, :] < right[:, None]
    before = (scores > of_right) | ((scores == of_right) & earlier)
    ranks: NDArray[np.int64] = np.add(1, np.count_nonzero(before, axis=1))
    return ranks


def _accuracy(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(ranks == 1, 1.0, 0.0)


def _reciprocal_rank(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(ranks <= _CUTOFF, 1.0 / ranks, 0.0)


def _recall(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(ranks <= _CUTOFF, 1.0, 0.0)


METRICS: dict[Metric, Callable[[NDArray[np.int64]], NDArray[np.float64]]] = {
    "acc@1": _accuracy,
    "MRR@10": _reciprocal_rank,
    "recall@10": _recall,
}
"""Each metric's value per query (float64, from 0 to 1); the metric is their mean over queries.

``acc@1``: the right document is at the top. ``MRR@10``: 1 / its rank, 0 beyond rank 10
(Voorhees, TREC-8, 1999). ``recall@10``: it is among the first ten; a query has one right
document.
"""
