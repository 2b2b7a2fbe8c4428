"""How good a retriever is: metrics, intervals over clients, and the baselines to beat."""

from carpool_device.evaluation.baselines import evaluate_bm25
from carpool_device.evaluation.bootstrap import Interval, paired_difference, summarise
from carpool_device.evaluation.evaluate import (
    Queries,
    evaluate_theta,
    prepare_queries,
    rank_queries,
)
from carpool_device.evaluation.metrics import METRICS, Ranking

__all__ = [
    "METRICS",
    "Interval",
    "Queries",
    "Ranking",
    "evaluate_bm25",
    "evaluate_theta",
    "paired_difference",
    "prepare_queries",
    "rank_queries",
    "summarise",
]
