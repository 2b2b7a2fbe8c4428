"""Federated rounds over simulated devices, in the foreground, on this machine or a Ray cluster."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from flwr.app import ConfigRecordValues, Context
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

from carpool.bundle import Bundle
from carpool.config import RunConfig, SimulationConfig
from carpool.data.dataset import Dataset
from carpool.errors import CarpoolError, RoundFailed
from carpool_device.training import train_locally
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import finished, run_rounds
from carpool_server.flower import make_server_app
from carpool_server.hooks import Audit, NoAudit, RoundHook
from carpool_server.job import Job, RunResult
from carpool_server.sampling import sampling_rate
from carpool_sim.aggregator import LocalTraining, Sources, data_id_of, make_client_app
from carpool_sim.quiet import LOG_NAME, logs_to, stop_on_signals

_OBJECT_STORE_BYTES = 256 << 20
"""Ray's shared memory: messages are a few megabytes each."""

_SHUTDOWN_SECONDS = 30.0


def run(
    bundle: Path,
    dataset_dir: Path,
    out_dir: Path,
    config: RunConfig,
    *,
    resume: bool = False,
    hooks: Sequence[RoundHook] = (),
    audit: Audit | None = None,
    keep_every: int = 1,
    ledger: Path | None = None,
    train: LocalTraining = train_locally,
) -> RunResult:
    """Trains theta by federated rounds; the devices are the data set's training clients.

    Guarantees: in mode ``none`` the final theta is a function of bundle, data set and settings
    without ``simulation``, bit for bit on one kind of CPU, wherever the run was killed and
    resumed in between, as long as no deadline cuts a device off.

    Args:
        bundle: the bundle's folder.
        dataset_dir: the data set's folder.
        out_dir: the run's folder: checkpoint, ledger, released thetas, ``flower.log``.
        config: all settings.
        resume: go on with the run in ``out_dir``; a finished one just gives its result.
        hooks: called after every release, in order, in the coordinator's thread.
        audit: the operator's look inside a round.
        keep_every: keep the released theta of every k-th round, and of the last.
        ledger: the population's privacy ledger, where several runs share one population; None
            keeps one in ``out_dir``: the devices are imagined for this run alone.
        train: what devices do; another one simulates an attack, and the same must be given on
            resume.

    Raises:
        BundleError: the bundle cannot be used.
        CorpusError: the data set cannot be used.
        ConfigError: settings that do not fit the population, or changed on resume.
        CheckpointError: the folder cannot be used as asked.
        PrivacyError: the budget cannot be met or is spent.
        RoundFailed: a round stayed below its quorum, or the engine broke down.
        RunStopped: Ctrl-C; resume it.
    """
    opened = Bundle.open(bundle)
    devices = Dataset.open(dataset_dir).part("train")
    sampling_rate(expected_size=config.cohort.expected_size, population=len(devices))
    job = Job(
        config=config,
        bundle_id=opened.id,
        layout=opened.manifest.layout,
        initial_theta=opened.initial_theta(),
        ledger_path=ledger,
        hooks=hooks,
        audit=audit or NoAudit(),
        aggregators=config.simulation.aggregators,
    )
    folder = RunFolder(
        out_dir,
        config=config,
        bundle_id=opened.id,
        data_id=data_id_of(dataset_dir),
        resume=resume,
        keep_every=keep_every,
    )
    with closing(folder):
        if folder.state is not None and folder.state.info.finished:
            return finished(job, folder)
        # absolute: Ray's workers have a working directory of their own
        sources = Sources(
            bundle=str(bundle.resolve()),
            data=str(dataset_dir.resolve()),
            threads=max(1, int(config.simulation.cpus_per_aggregator)),
        )
        return _simulate(job, folder, sources, train)


@dataclasses.dataclass
class _Outcome:
    """What the coordinator's thread came to; Flower passes neither results nor errors on."""

    result: RunResult | None = None
    error: Exception | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


def _simulate(job: Job, folder: RunFolder, sources: Sources, train: LocalTraining) -> RunResult:
    outcome = _Outcome()

    def main(grid: Grid, _context: Context) -> None:
        try:
            outcome.result = run_rounds(grid, job, folder)
        except Exception as error:  # noqa: BLE001  raised again where the caller is
            outcome.error = error
        finally:
            outcome.done.set()

    simulation = job.config.simulation
    log = folder.path / LOG_NAME
    broken: RoundFailed | None = None
    with logs_to(log), stop_on_signals(job.stop):
        try:
            run_simulation(
                server_app=make_server_app(main),
                client_app=make_client_app(sources, train=train),
                num_supernodes=simulation.aggregators,
                backend_config={
                    "client_resources": {"num_cpus": simulation.cpus_per_aggregator},
                    "init_args": _ray_arguments(simulation),
                },
            )
        except RuntimeError as error:
            if outcome.error is None:  # else the engine only ended with the coordinator
                broken = RoundFailed(
                    f"Flower's simulation engine stopped: {_root_of(error)}. See {log}; "
                    "resume the run with --resume if it had begun."
                )
                broken.__cause__ = error
        finally:  # the coordinator must not go on in an engine that is gone
            job.stop.set()
            outcome.done.wait(_SHUTDOWN_SECONDS)
    failure = broken or outcome.error
    if failure is not None:
        raise failure
    if outcome.result is None:
        raise CarpoolError(f"the coordinator ended without a result; see {log}.")
    return outcome.result


def _root_of(error: BaseException) -> BaseException:
    """What began it: Flower wraps errors twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _ray_arguments(simulation: SimulationConfig) -> dict[str, ConfigRecordValues]:
    quiet: dict[str, ConfigRecordValues] = {"logging_level": "ERROR", "log_to_driver": False}
    if simulation.ray_address is not None:
        return quiet | {"address": simulation.ray_address}
    wanted = math.ceil(simulation.aggregators * simulation.cpus_per_aggregator)
    return quiet | {
        "address": "local",  # never a cluster that somebody else started on this machine
        # one worker per aggregator at most: an idle one costs a few hundred megabytes
        "num_cpus": min(os.cpu_count() or 1, wanted),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
