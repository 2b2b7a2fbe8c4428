"""What a run is given, and what it gives back."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carpool.config import RunConfig
from carpool.theta import Layout
from carpool_server.checkpoint import RunInfo
from carpool_server.hooks import Audit, NoAudit, RoundHook

REGISTRATION_SECONDS = 300.0
"""For all aggregators to come and say which devices they speak for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: everything that the coordinator needs beside Flower's ``Grid``.

    Attributes:
        config: the settings.
        bundle_id, layout: what is trained.
        initial_theta: float32, shape ``(layout.num_values,)``.
        ledger_path: the population's ledger; None keeps one in the run's own folder.
        hooks: called after every release, in order.
        audit: the operator's look inside a round.
        stop: set it to stop the run; it can be resumed.
        aggregators: how many must register before the first round.
        registration_seconds: for that.
    """

    config: RunConfig
    bundle_id: str
    layout: Layout
    initial_theta: NDArray[np.float32]
    ledger_path: Path | None = None
    hooks: Sequence[RoundHook] = ()
    audit: Audit = dataclasses.field(default_factory=NoAudit)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    aggregators: int = 1
    registration_seconds: float = REGISTRATION_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that is over.

    Attributes:
        info: settings, ids, versions and the rounds' numbers; ``info.ended`` says why, where
            not all rounds were run.
        theta: float32, shape ``(num_values,)``: the last release, or the initial one.
        theta_path: its file.
        epsilon: spent over all rounds, in mode ``central``.
        already_finished: whether there was nothing left to do.
    """

    info: RunInfo
    theta: NDArray[np.float32]
    theta_path: Path
    epsilon: float | None
    already_finished: bool
