from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from carpool.data.corpus import Document, Example
from carpool.errors import DeviceError
from carpool_device.evaluation import (
    METRICS,
    Ranking,
    evaluate_bm25,
    paired_difference,
    summarise,
)
from carpool_device.evaluation.bootstrap import RESAMPLES
from carpool_device.evaluation.metrics import ranks_of


def ranking(ranks: list[int], client: list[int]) -> Ranking:
    names = tuple(f"c{i}" for i in range(max(client) + 1))
    return Ranking(ranks=np.array(ranks), client=np.array(client), clients=names)


def random_ranking(seed: int, *, clients: int = 40) -> Ranking:
    """Clients of very different sizes and abilities, as in the real data."""
    rng = np.random.default_rng(seed)
    sizes = rng.geometric(0.1, clients)
    ability = np.repeat(rng.uniform(0.05, 0.9, clients), sizes)
    return ranking(rng.geometric(ability).tolist(), np.repeat(np.arange(clients), sizes).tolist())


def test_metrics_of_a_case_worked_out_by_hand() -> None:
    """Ranks 1, 2, 10, 11: one hit at the top, reciprocal ranks 1, 1/2, 1/10, 0, three of ten."""
    found = summarise(ranking([1, 2, 10, 11], [0, 0, 1, 1]))
    assert {name: interval.value for name, interval in found.items()} == {
        "acc@1": 1 / 4,
        "MRR@10": pytest.approx((1 + 1 / 2 + 1 / 10) / 4, rel=1e-15),
        "recall@10": 3 / 4,
    }


def test_metrics_equal_literal_loops_over_sorted_lists() -> None:
    """As trec_eval reads a run: sort, walk down the first ten, look for the right document."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, (200, 50)).astype(np.float32)  # with many ties
    right = rng.integers(0, 50, 200)
    expected = {"acc@1": 0.0, "MRR@10": 0.0, "recall@10": 0.0}
    for row, answer in zip(scores.tolist(), right.tolist(), strict=True):
        run = sorted(range(50), key=lambda place: (-row[place], place))
        for position, place in enumerate(run[:10], start=1):
            if place == answer:
                expected["acc@1"] += (position == 1) / 200
                expected["MRR@10"] += 1 / position / 200
                expected["recall@10"] += 1 / 200
    ranks = ranks_of(scores, right)
    assert ranks.dtype == np.int64
    for name, of_rank in METRICS.items():
        assert of_rank(ranks).mean() == pytest.approx(expected[name], rel=1e-12)


def test_a_rank_is_the_place_in_a_stable_sort() -> None:
    """Best, worst, and between equals: an earlier document stands before, a later one after."""
    scores = np.array([[3, 1, 3, 2, 3]], dtype=np.float32).repeat(5, axis=0)
    assert ranks_of(scores, np.arange(5)).tolist() == [1, 5, 2, 4, 3]


def test_scores_that_are_not_numbers_are_refused() -> None:
    """NaN compares false, so a broken program would have been given rank 1 everywhere."""
    scores = np.array([[1, np.nan], [np.nan, 2]], dtype=np.float32)
    with pytest.raises(DeviceError, match=r"^expected scores, got 2 NaN among them\.$"):
        ranks_of(scores, np.array([0, 1]))


@pytest.mark.parametrize("metric", list(METRICS))
def test_intervals_equal_scipys_bootstrap_over_clients(metric: str) -> None:
    """SciPy resamples (sum, count) pairs; both ends within the error of 10,000 resamples."""
    found = random_ranking(1)
    values = METRICS[metric](found.ranks)
    sums = np.array([values[found.client == c].sum() for c in range(40)])
    counts = np.array([np.sum(found.client == c) for c in range(40)])
    expected = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=50_000,
        rng=np.random.default_rng(3),
    )
    value, low, high = summarise(found)[metric]
    assert value == pytest.approx(values.mean(), rel=1e-12)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_clients_are_resampled_and_not_queries() -> None:
    """Fifty clients of twenty like queries: the interval is that of fifty values, not 1,000.

    Half the clients are always right, so the mean over clients is a binomial share: exact
    quantiles from scipy.
    """
    found = ranking(
        [1 if c % 2 else 50 for c in range(50) for _ in range(20)],
        [c for c in range(50) for _ in range(20)],
    )
    _, low, high = summarise(found)["acc@1"]
    assert low == stats.binom.ppf(0.025, 50, 0.5) / 50
    assert high == stats.binom.ppf(0.975, 50, 0.5) / 50


def test_a_difference_is_paired_by_client() -> None:
    """Where b is a with every client 0.1 better, the difference has no spread at all."""
    ranks_a, ranks_b, owner = [], [], []
    for client in range(30):
        hits = client % 9
        ranks_a += [1] * hits + [2] * (10 - hits)
        ranks_b += [1] * (hits + 1) + [2] * (9 - hits)
        owner += [client] * 10
    found = paired_difference(ranking(ranks_b, owner), ranking(ranks_a, owner), "acc@1")
    assert found == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize("metric", list(METRICS))
def test_differences_equal_scipys_bootstrap_over_clients(metric: str) -> None:
    """SciPy draws clients once for both systems."""
    a, b = random_ranking(1), random_ranking(1)
    better = np.maximum(1, b.ranks - np.random.default_rng(2).integers(0, 3, b.ranks.size))
    b = Ranking(ranks=better, client=b.client, clients=b.clients)
    per_client = [
        [METRICS[metric](r.ranks[r.client == c]).sum() for c in range(40)] for r in (b, a)
    ]
    counts = np.bincount(a.client)
    expected = stats.bootstrap(
        (*map(np.array, per_client), counts),
        lambda s, t, n, axis: (s.sum(axis=axis) - t.sum(axis=axis)) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=50_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    value, low, high = paired_difference(b, a, metric)
    assert value == pytest.approx(METRICS[metric](b.ranks).mean() - METRICS[metric](a.ranks).mean())
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)
    reverse = paired_difference(a, b, metric)
    assert reverse == pytest.approx((-value, -high, -low))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """300 samples of 60 clients from a known population: 95 % intervals miss 2 to 9 %."""
    rng = np.random.default_rng(0)
    missed = 0
    for trial in range(300):
        ability = rng.beta(2, 2, 60)  # mean 1/2
        hits = rng.random((60, 10)) < ability[:, None]
        ranks = np.where(hits, 1, 2).ravel().tolist()
        owner = np.repeat(np.arange(60), 10).tolist()
        _, low, high = summarise(ranking(ranks, owner), resamples=1000, seed=trial)["acc@1"]
        missed += not low <= 0.5 <= high
    assert 0.02 <= missed / 300 <= 0.09


def test_equal_seeds_give_equal_intervals() -> None:
    """And other seeds nearly the same ones."""
    found = random_ranking(1)
    assert summarise(found, seed=4) == summarise(found, seed=4)
    assert summarise(found, seed=4) != summarise(found, seed=5)
    a, b = (summarise(found, seed=seed)["acc@1"] for seed in (4, 5))
    assert a == pytest.approx(b, abs=0.01)


def test_many_clients_are_drawn_in_parts() -> None:
    """More clients than fit into memory at once: as many resamples, and a normal interval.

    The share of 20,000 clients of one query each has a standard error of sqrt(p (1 - p) / n).
    """
    n = 20_000
    ranks = np.where(np.arange(n) < n // 4, 1, 2).tolist()
    value, low, high = summarise(ranking(ranks, list(range(n))), resamples=500)["acc@1"]
    error = np.sqrt(0.25 * 0.75 / n)
    assert value == 0.25
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert RESAMPLES == 10_000


def test_rankings_of_other_queries_are_not_compared() -> None:
    """Paired means the same queries of the same clients."""
    with pytest.raises(DeviceError) as caught:
        paired_difference(ranking([1, 1], [0, 1]), ranking([1, 1, 1], [0, 0, 1]), "acc@1")
    assert str(caught.value) == (
        "expected two rankings of the same queries, got 2 queries of 2 clients and 3 of 2."
    )


DOCUMENTS = [
    Document(id="a", title="Credential dumping", text="Reads passwords from memory."),
    Document(id="b", title="Screen capture", text="Takes pictures of the screen, the screen."),
    Document(id="c", title="Keylogging", text=""),
    Document(id="d", title="Input capture", text="Captures passwords typed at a login prompt."),
]


def bm25_by_hand(query: list[str], documents: list[list[str]]) -> list[float]:
    """Robertson's formula with Lucene's idf, k1 = 1.5 and b = 0.75, term by term."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for term in query:
            holders = sum(term in other for other in documents)
            idf = np.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            times = words.count(term)
            score += idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        scores.append(score)
    return scores


def test_bm25_ranks_as_its_formula_does() -> None:
    """The library against the formula written out, stop words taken out by hand."""
    words = [
        ["credential", "dumping", "reads", "passwords", "from", "memory"],
        ["screen", "capture", "takes", "pictures", "screen", "screen"],
        ["keylogging"],
        ["input", "capture", "captures", "passwords", "typed", "login", "prompt"],
    ]
    queries = ["passwords capture", "memory passwords", "Screen!", "keylogging passwords login"]
    examples = {
        d.id: [Example(client=d.id, query=q, document=d.id) for q in queries] for d in DOCUMENTS
    }
    found = evaluate_bm25(DOCUMENTS, examples).ranks.reshape(4, 4)
    for column, query in enumerate(queries):
        scores = bm25_by_hand(query.lower().strip("!").split(), words)
        order = sorted(range(4), key=lambda place: (-scores[place], place))
        assert found[:, column].tolist() == [order.index(place) + 1 for place in range(4)]


@pytest.mark.parametrize("query", ["雪", "the of", "?", "x" * 10_000, "unheard of"])
def test_bm25_takes_any_query(query: str) -> None:
    """Without a known word all scores are 0: the documents stand in the catalogue's order."""
    examples = {d.id: [Example(client="x", query=query, document=d.id)] for d in DOCUMENTS}
    done: list[int] = []
    found = evaluate_bm25(DOCUMENTS, examples, on_progress=done.append)
    assert found.ranks.tolist() == [1, 2, 3, 4]
    assert sum(done) == 4


def test_clients_without_queries_are_left_out_and_no_query_at_all_is_refused() -> None:
    """An interval over clients with nothing to say would be too narrow."""
    one = [Example(client="x", query="screen", document="b")]
    assert evaluate_bm25(DOCUMENTS, {"w": [], "x": one, "y": []}).clients == ("x",)
    with pytest.raises(DeviceError, match=r"^expected at least one query to rank, got none\.$"):
        evaluate_bm25(DOCUMENTS, {"w": []})


def test_an_unknown_document_is_named() -> None:
    """Whole message."""
    examples = {"x": [Example(client="x", query="screen", document="z")]}
    with pytest.raises(DeviceError) as caught:
        evaluate_bm25(DOCUMENTS, examples)
    assert str(caught.value) == (
        "client x: unknown document id 'z'; expected one of the bundle's 4 documents."
    )
