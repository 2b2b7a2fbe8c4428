"""Rounds over the real aggregator and its devices, in this process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from round_kit import Witness

from carpool.bundle import Bundle
from carpool.config import RunConfig
from carpool_device.training import train_locally
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import run_rounds
from carpool_server.in_process import LocalGrid, app_nodes
from carpool_server.job import Job, RunResult
from carpool_sim.aggregator import LocalTraining, Sources, data_id_of, make_client_app


def run_apps(
    sources: Sources,
    out: Path,
    config: RunConfig,
    *,
    parts: int,
    witness: Witness | None = None,
    resume: bool = False,
    train: LocalTraining = train_locally,
) -> RunResult:
    """The result of a run whose devices are those of ``sources``, over ``parts`` aggregators."""
    bundle = Bundle.open(Path(sources.bundle))
    job = Job(
        config=config,
        bundle_id=bundle.id,
        layout=bundle.manifest.layout,
        initial_theta=bundle.initial_theta(),
        audit=witness or Witness(),
        aggregators=parts,
    )
    folder = RunFolder(
        out,
        config=config,
        bundle_id=bundle.id,
        data_id=data_id_of(Path(sources.data)),
        resume=resume,
    )
    with closing(folder):
        grid = LocalGrid(app_nodes(make_client_app(sources, train=train), parts=parts))
        return run_rounds(grid, job, folder)
