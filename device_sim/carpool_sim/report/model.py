"""What a report holds; everything printed or drawn comes from here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carpool.config import RunConfig
from carpool.data.dataset import SplitName
from carpool.data.folder import Summary
from carpool.schema import Model, Sha256
from carpool_device.evaluation.bootstrap import CONFIDENCE, Interval
from carpool_device.evaluation.metrics import Metric

Verdict = Literal["better", "worse", "not shown to differ"]


class Comparison(Model):
    """One system's metric minus another's, on the same queries, paired by client."""

    system: str
    against: str
    metric: Metric
    difference: Interval

    @property
    def verdict(self) -> Verdict:
        """``better`` or ``worse`` only where the whole interval lies on that side of 0."""
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "not shown to differ"


class CurvePoint(Model):
    """A released theta on the curve's sample of queries; round 0 is the untrained one."""

    round_number: Annotated[int, Field(ge=0)]
    accuracy: float
    reciprocal_rank: float


class Training(Model):
    """One federated run.

    Attributes:
        config: its resolved settings, the seed among them.
        trained_values: how many of theta's values the devices moved.
        population: devices that could be drawn.
        noise_multiplier: z: noise standard deviation over clip norm; 0 without privacy.
        epsilon: spent, at ``config.privacy.delta``; None where no epsilon is achieved.
        statement: what the run may say of its privacy, in sentences.
        seconds: of all rounds together, without start-up.
        bytes_down, bytes_up: of all rounds, between coordinator and aggregators; None where
            privacy is promised, since they tell who was drawn.
        versions: of what computed it.
        theta: the released file, relative to the report.
        curve: accuracy by round on the curve's sample.
    """

    config: RunConfig
    trained_values: int
    population: int
    noise_multiplier: float
    epsilon: float | None
    statement: tuple[str, ...]
    seconds: float
    bytes_down: int | None
    bytes_up: int | None
    versions: dict[str, str]
    theta: str
    curve: tuple[CurvePoint, ...]


class Report(Model):
    """The demo's result.

    Attributes:
        preset: of the bundle.
        bundle_id: whose program was trained.
        data: what the data set is made of, kept and dropped.
        split: whose clients asked; they were never trained on.
        clients, queries: how many of them.
        curve_clients, curve_queries: the fixed sample of them that the curve is on.
        curve_baseline: BM25's acc@1 on that sample.
        confidence: of all intervals, which are over clients.
        systems: each system's metrics.
        comparisons: differences between systems.
        trainings: by system.
        processor: what it ran on.
        cores: how many it had.
    """

    version: Literal[1] = 1
    preset: str
    bundle_id: Sha256
    data: Summary
    split: SplitName
    clients: int
    queries: int
    curve_clients: int
    curve_queries: int
    curve_baseline: float
    confidence: float = CONFIDENCE
    systems: dict[str, dict[Metric, Interval]]
    comparisons: tuple[Comparison, ...]
    trainings: dict[str, Training]
    processor: str
    cores: int
