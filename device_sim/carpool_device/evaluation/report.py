"""Rankings side by side: as a table to read and as values to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from rich.table import Table

from carpool.data.dataset import SplitName
from carpool.schema import Model, Sha256
from carpool_device.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    paired_difference,
    summarise,
)
from carpool_device.evaluation.metrics import METRICS, Metric, Ranking

ZERO_SHOT = "zero-shot"
BM25 = "BM25"


class Evaluation(Model):
    """What ``carpool evaluate`` writes.

    Attributes:
        version: of this schema.
        bundle_id: whose program, documents and tokenizer were used.
        split: whose clients asked.
        clients, queries: how many.
        confidence, resamples, seed: of the intervals, which are over clients.
        thetas: SHA-256 of each theta file, by system.
        systems: each system's metrics: value, low, high.
        against_zero_shot: each other system's metrics minus zero-shot's, paired by client.
        versions: of the packages that computed it.
    """

    version: Annotated[int, Field(ge=1)] = 1
    bundle_id: Sha256
    split: SplitName
    clients: int
    queries: int
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0
    thetas: dict[str, Sha256]
    systems: dict[str, dict[Metric, Interval]]
    against_zero_shot: dict[str, dict[Metric, Interval]]
    versions: dict[str, str]


def summarise_all(rankings: Mapping[str, Ranking]) -> dict[str, dict[Metric, Interval]]:
    """``summarise`` for every system."""
    return {name: summarise(ranking) for name, ranking in rankings.items()}


def differences_from(
    reference: str, rankings: Mapping[str, Ranking]
) -> dict[str, dict[Metric, Interval]]:
    """Every other system's metrics minus the reference's, paired by client.

    Args:
        reference: a name in ``rankings``.
        rankings: of the same queries.

    Raises:
        DeviceError: the rankings are not of the same queries.
    """
    return {
        name: {
            metric: paired_difference(ranking, rankings[reference], metric) for metric in METRICS
        }
        for name, ranking in rankings.items()
        if name != reference
    }


def as_table(
    systems: Mapping[str, Mapping[Metric, Interval]],
    differences: Mapping[str, Mapping[Metric, Interval]],
    *,
    title: str,
    reference: str = ZERO_SHOT,
) -> Table:
    """One row per system: every metric with its interval, and acc@1 minus the reference's."""
    table = Table(title=title, caption=f"In brackets: {CONFIDENCE:.0%} intervals over clients.")
    table.add_column("system", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric, justify="right")
    table.add_column(f"acc@1 - {reference}", justify="right")
    for name, metrics in systems.items():
        difference = differences.get(name)
        table.add_row(
            name,
            *(_text(metrics[metric]) for metric in METRICS),
            "" if difference is None else _text(difference["acc@1"], sign="+"),
        )
    return table


def _text(interval: Interval, *, sign: str = "") -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in interval)
    return f"{value}\n\\[{low}, {high}]"  # rich would take "[0.3" for markup
