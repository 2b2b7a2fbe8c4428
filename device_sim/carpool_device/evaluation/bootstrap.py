"""Intervals over clients: queries of one client are alike, so clients are what is resampled.

A metric is a mean over queries, so over resampled clients it is a ratio: the sum of the drawn
clients' values over the number of the drawn clients' queries. Percentile intervals after Efron
and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; for clustered data by
resampling whole clusters: Davison and Hinkley, Bootstrap Methods (1997), section 3.8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carpool.errors import DeviceError
from carpool_device.evaluation.metrics import METRICS, Metric, Ranking

RESAMPLES = 10_000
CONFIDENCE = 0.95
_VALUES_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """A value and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def summarise(
    ranking: Ranking, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[Metric, Interval]:
    """Every metric with its interval. Equal arguments give equal numbers.

    Args:
        ranking: at least one query.
        resamples: how many times the clients are drawn anew.
        seed: of the draws.
    """
    sums = np.stack([_sums(of_rank(ranking.ranks), ranking) for of_rank in METRICS.values()])
    counts = _sums(np.ones(ranking.ranks.size), ranking)
    intervals = cluster_intervals(sums, counts, resamples=resamples, seed=seed)
    return dict(zip(METRICS, intervals, strict=True))


def paired_difference(
    a: Ranking, b: Ranking, metric: Metric, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """``metric`` of ``a`` minus that of ``b``, on the same queries, with its interval.

    Both systems see the same drawn clients, so what makes a client hard for both cancels out.
    An interval above 0 says that ``a`` is better on clients like these.

    Raises:
        DeviceError: the rankings are not of the same queries.
    """
    if a.clients != b.clients or not np.array_equal(a.client, b.client):
        raise DeviceError(
            f"expected two rankings of the same queries, got {a.ranks.size} queries of "
            f"{len(a.clients)} clients and {b.ranks.size} of {len(b.clients)}."
        )
    of_rank = METRICS[metric]
    difference = of_rank(a.ranks) - of_rank(b.ranks)
    counts = _sums(np.ones(a.ranks.size), a)
    sums = _sums(difference, a)[None, :]
    return cluster_intervals(sums, counts, resamples=resamples, seed=seed)[0]


def cluster_intervals(
    sums: NDArray[np.float64], counts: NDArray[np.float64], *, resamples: int, seed: int
) -> list[Interval]:
    """``sum(sums[k]) / sum(counts)`` for each k, with its percentile interval over clusters.

    Args:
        sums: float64, shape ``(K, C)``: each cluster's sum of each of K values.
        counts: float64, shape ``(C,)``: each cluster's number of values, positive.
        resamples: how many times C clusters are drawn, with replacement.
        seed: of the draws, which all K share.

    Returns:
        K ratios with intervals; with one cluster intervals of width 0, which say nothing.
    """
    rng = np.random.default_rng(seed)
    num_clusters = counts.size
    chances = np.full(num_clusters, 1 / num_clusters)
    ratios = []
    step = max(1, _VALUES_AT_ONCE // num_clusters)
    for start in range(0, resamples, step):
        # How often each cluster is drawn among C draws.
        times = rng.multinomial(num_clusters, chances, size=min(step, resamples - start))
        ratios.append((times @ sums.T) / (times @ counts)[:, None])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail], axis=0)
    values = sums.sum(axis=1) / counts.sum()
    return [Interval(*map(float, row)) for row in zip(values, low, high, strict=True)]


def _sums(values: NDArray[np.float64], ranking: Ranking) -> NDArray[np.float64]:
    """Each client's sum: float64, shape ``(C,)``."""
    sums = np.zeros(len(ranking.clients))
    np.add.at(sums, ranking.client, values)
    return sums
