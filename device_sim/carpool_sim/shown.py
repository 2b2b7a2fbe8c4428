"""A run that shows its progress and goes on where it was: what demo and benchmarks do."""

from __future__ import annotations

from pathlib import Path

from carpool.config import RunConfig
from carpool.progress import progress
from carpool_device.training import train_locally
from carpool_server.checkpoint import CHECKPOINT_NAME
from carpool_server.hooks import Audit
from carpool_server.job import RunResult
from carpool_sim.aggregator import LocalTraining
from carpool_sim.federate import run
from carpool_sim.progress import ProgressHook


def run_shown(
    bundle: Path,
    data: Path,
    folder: Path,
    config: RunConfig,
    *,
    name: str,
    keep_every: int | None = None,
    audit: Audit | None = None,
    train: LocalTraining = train_locally,
) -> RunResult:
    """``federate.run`` under a bar: begun, resumed, or, where it is finished, just its result.

    Args:
        bundle: as ``federate.run`` takes it.
        data: likewise.
        folder: the run's, likewise.
        config: likewise.
        name: beside the bar.
        keep_every: keep the released theta of every k-th round; None keeps the last alone.
        audit: as ``federate.run`` takes it.
        train: likewise.

    Raises:
        CarpoolError: whatever ``federate.run`` raises.
    """
    with progress(name, total=config.rounds) as bar:
        return run(
            bundle,
            data,
            folder,
            config,
            resume=(folder / CHECKPOINT_NAME).exists(),
            hooks=[ProgressHook(bar)],
            audit=audit,
            keep_every=keep_every or config.rounds,
            train=train,
        )
