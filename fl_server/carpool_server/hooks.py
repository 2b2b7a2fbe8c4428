"""Seams of a round: a hook for what may be told, an audit for what must stay inside."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from carpool.errors import Refusal
from carpool.schema import Model
from carpool_server.privacy.metrics import RoundMetrics

Count = Annotated[int, Field(ge=0)]


class RoundRecord(Model):
    """A round's numbers, as the checkpoint and the report keep them.

    In mode ``central`` whatever would tell something exact about the cohort is None: how many
    were drawn, took part or were refused, the aggregators that were refused, the bytes (they
    hold the cohort's names), and the loss. In mode ``example_level`` the loss is.

    Attributes:
        round_number: 1 or more.
        seconds: from the draw to the checkpoint.
        bytes_down, bytes_up: bodies and headers to and from the aggregators.
        extensions: deadlines that passed below the quorum.
        drawn: devices in the cohort.
        count: devices whose updates are in the sum.
        refused: devices whose aggregator gave a reason instead of an update.
        rejected: contributions and replies that were not added; each message names the
            aggregator, what was expected and what was found.
        mean_loss: mean of the devices' mean training losses.
        epsilon: spent up to and with this round; mode ``central`` only.
        clip_norm: C of this round, in theta's units.
        metrics: the devices' noised metrics, where the settings ask for them.
    """

    round_number: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(ge=0)]
    bytes_down: Count | None = None
    bytes_up: Count | None = None
    extensions: Count
    drawn: Count | None = None
    count: Count | None = None
    refused: Count | None = None
    rejected: tuple[str, ...] | None = None
    mean_loss: float | None = None
    epsilon: Annotated[float, Field(ge=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)]
    metrics: RoundMetrics | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """What a hook may know of a released round.

    Attributes:
        round_number: 1 or more.
        rounds: of the whole run.
        theta: float32, shape ``(num_values,)``: the released one; read-only.
        record: the round's numbers.
        refused: device id -> why its update is not in; empty in mode ``central``.
    """

    round_number: int
    rounds: int
    theta: NDArray[np.float32]
    record: RoundRecord
    refused: dict[str, Refusal]


class RoundHook(Protocol):
    """Called after every round's release, in the coordinator's thread."""

    def after_round(self, facts: RoundFacts) -> None:
        """Reads the facts. An error stops the run, which can be resumed.

        Called at least once per round: a run that was killed calls it again for the last
        released round (without ``refused``), so a hook that has the round already returns.
        """


Step = Literal[
    "summed",
    "counted",
    "charged",
    "noised",
    "stepped",
    "checkpointed",
    "marked",
    "released",
    "hooked",
]
"""The boundaries of a round, in order: ``counted`` in the participations, ``charged`` and
``marked`` in the ledger. All are passed in every mode; ``noised`` stands for zeros in ``none``."""


class Audit(Protocol):
    """The operator's look inside a round, within the trust boundary. Tests use it.

    What it sees (exact sums, cohorts) is what noise protects: carpool itself never writes,
    prints or sends it.
    """

    def summed(
        self, round_number: int, total: NDArray[np.int64], device_ids: tuple[str, ...]
    ) -> None:
        """The exact sum before noise, in grid units, and whose updates are in it."""

    def reached(self, round_number: int, step: Step) -> None:
        """A boundary was passed: all before it is done, nothing after it has begun."""


class NoAudit:
    """Looks at nothing."""

    def summed(
        self, round_number: int, total: NDArray[np.int64], device_ids: tuple[str, ...]
    ) -> None:
        """Does nothing."""

    def reached(self, round_number: int, step: Step) -> None:
        """Does nothing."""
