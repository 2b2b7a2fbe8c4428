"""The rounds: draw, gather, charge, noise, step, checkpoint, release, tell."""

from __future__ import annotations

import dataclasses
import logging
import platform
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from carpool.config import RunConfig
from carpool.errors import CheckpointError, Refusal
from carpool.protocol import TaskHeader
from carpool.theta import Layout
from carpool_server.aggregation import grid_step
from carpool_server.checkpoint import RunFolder, RunInfo, RunState
from carpool_server.exchange import Exchange
from carpool_server.gather import Gathered, Gathering, Owners
from carpool_server.hooks import Audit, NoAudit, RoundFacts, RoundHook, RoundRecord
from carpool_server.ledger import LEDGER_NAME, Charge, Ledger
from carpool_server.optimizers import make_optimizer, rate_at
from carpool_server.population import identify, register
from carpool_server.privacy import gaussian_on_grid, noise_multiplier_for
from carpool_server.sampling import KEY_BYTES, PoissonSampler, derived_key, sampling_rate

REGISTRATION_SECONDS = 300.0
"""For all aggregators to come and say which devices they speak for."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: everything that the coordinator needs beside Flower's ``Grid``.

    Attributes:
        config: the settings.
        bundle_id, layout: what is trained.
        initial_theta: float32, shape ``(layout.num_values,)``.
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
    hooks: Sequence[RoundHook] = ()
    audit: Audit = dataclasses.field(default_factory=NoAudit)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    aggregators: int = 1
    registration_seconds: float = REGISTRATION_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        info: settings, ids, versions and the rounds' numbers.
        theta: float32, shape ``(num_values,)``: the last release.
        theta_path: its file.
        epsilon: spent over all rounds, or None in mode ``none``.
        already_finished: whether there was nothing left to do.
    """

    info: RunInfo
    theta: NDArray[np.float32]
    theta_path: Path
    epsilon: float | None
    already_finished: bool


def run_rounds(grid: Grid, job: Job, folder: RunFolder) -> RunResult:
    """Runs all rounds that are left, each released once.

    A round's order is what makes a crash harmless: exact sum; charge durable in the ledger;
    noise; server step; checkpoint, atomic; release; hooks. Before the checkpoint nothing of
    the round exists outside this process, so the round is done again: with the same devices
    and the same sum, a charge that is not repeated, and fresh noise. After it the checkpoint
    has the released theta, and only its file and the hooks may be left to do.

    Args:
        grid: Flower's.
        job: what to run.
        folder: the run's, opened for this job.

    Raises:
        RoundFailed: aggregators that never registered, or a round below its quorum.
        ContributionRejected: an aggregator with another bundle, layout or data set.
        ConfigError: a cohort that is larger than the population.
        CheckpointError: another population than the checkpoint's.
        PrivacyError: a budget that is spent or cannot be met; nothing was released.
        RunStopped: ``job.stop`` was set.
    """
    state = folder.state
    if state is not None and state.info.finished:
        return finished(job, folder)
    exchange = Exchange(grid, stop=job.stop)
    owners, data_id = register(
        exchange,
        aggregators=job.aggregators,
        bundle_id=job.bundle_id,
        layout_id=job.layout.id,
        seconds=job.registration_seconds,
    )
    if state is None:
        state = _first_state(job, owners, data_id)
        folder.write(state)
        job.audit.reached(0, "checkpointed")
    else:
        _check_population(state.info, owners, data_id, folder.path)
    with _open_ledger(job, state.info, folder) as ledger:
        if state.info.round_number:
            _release(job, folder, state, ledger, refused={})
        for number in range(state.info.round_number + 1, job.config.rounds + 1):
            state = _run_round(
                number,
                state,
                job=job,
                folder=folder,
                exchange=exchange,
                owners=owners,
                ledger=ledger,
            )
    return _result(folder, state, already_finished=False)


def finished(job: Job, folder: RunFolder) -> RunResult:
    """The result of a folder whose run is over; its last release is made good if it was cut off.

    Raises:
        CheckpointError: the run is not over.
        PrivacyError: its ledger is not the run's.
    """
    state = folder.state
    if state is None or not state.info.finished:
        raise CheckpointError(f"{folder.path}: expected a finished run.")
    with _open_ledger(job, state.info, folder) as ledger:
        _release(job, folder, state, ledger, refused={})
    return _result(folder, state, already_finished=True)


def _run_round(
    number: int,
    state: RunState,
    *,
    job: Job,
    folder: RunFolder,
    exchange: Exchange,
    owners: Owners,
    ledger: Ledger | None,
) -> RunState:
    start = time.monotonic()
    config, info = job.config, state.info
    task = _task(number, info, owners)
    gathered = Gathering(
        exchange, task=task, theta=state.theta, owners=owners, rules=config.cohort
    ).run()
    total = gathered.total.values
    job.audit.summed(number, total.copy(), tuple(sorted(gathered.device_ids)))
    job.audit.reached(number, "summed")

    epsilon = None
    if ledger is not None:
        epsilon = ledger.charge(_charge(number, info))
    job.audit.reached(number, "charged")
    noise = gaussian_on_grid(total.size, noise_multiplier=info.noise_multiplier)
    job.audit.reached(number, "noised")

    # the denominator is fixed: it tells nothing about who was there
    unit = grid_step(config.privacy.clip_norm) / config.cohort.expected_size
    mean = (total + noise).astype(np.float64) * unit
    with np.errstate(over="ignore", invalid="ignore"):  # what comes out is looked at
        theta, optimizer = make_optimizer(config.server).step(
            state.theta,
            mean,
            state.optimizer,
            rate=rate_at(number, rounds=config.rounds, config=config.server),
        )
    # before the checkpoint: one that is durable can be resumed
    job.layout.check(theta, source=f"round {number}: theta after the server's step")
    job.audit.reached(number, "stepped")

    seconds = time.monotonic() - start
    record = _record(number, seconds, gathered, drawn=len(task.device_ids), epsilon=epsilon)
    new_info = info.model_copy(update={"round_number": number, "history": (*info.history, record)})
    state = RunState(info=new_info, theta=theta, optimizer=optimizer)
    folder.write(state)
    job.audit.reached(number, "checkpointed")
    _release(job, folder, state, ledger, refused=gathered.refused if ledger is None else {})
    return state


def _release(
    job: Job,
    folder: RunFolder,
    state: RunState,
    ledger: Ledger | None,
    *,
    refused: dict[str, Refusal],
) -> None:
    """Makes a checkpointed round known. May be done again: the files are there or made."""
    number = state.info.round_number
    if ledger is not None:
        ledger.mark_released(number)
    folder.release(state, layout=job.layout)
    job.audit.reached(number, "released")
    theta = state.theta.copy()
    theta.flags.writeable = False
    facts = RoundFacts(
        round_number=number,
        rounds=state.info.config.rounds,
        theta=theta,
        record=state.info.history[-1],
        refused=refused,
    )
    for hook in job.hooks:
        hook.after_round(facts)
    job.audit.reached(number, "hooked")


def _task(number: int, info: RunInfo, owners: Owners) -> TaskHeader:
    config = info.config
    key = (
        bytes.fromhex(info.sampling_key)
        if info.sampling_key is not None
        else derived_key(config.seed, purpose="carpool/1/cohort-key")
    )
    rate = sampling_rate(expected_size=config.cohort.expected_size, population=len(owners))
    return TaskHeader(
        run_id=info.run_id,
        round_number=number,
        bundle_id=info.bundle_id,
        layout_id=info.layout_id,
        recipe=config.local,
        order_key=derived_key(config.seed, purpose="carpool/1/order-key").hex(),
        clip_norm=config.privacy.clip_norm,
        device_ids=PoissonSampler(rate=rate, key=key).draw(owners, round_number=number),
        report_loss=config.privacy.mode == "none",
    )


def _charge(number: int, info: RunInfo) -> Charge:
    cohort = info.config.cohort
    return Charge(
        round_number=number,
        noise_multiplier=info.noise_multiplier,
        sampling_rate=sampling_rate(
            expected_size=cohort.expected_size, population=info.population.size
        ),
        clip_norm=info.config.privacy.clip_norm,
    )


def _record(
    number: int, seconds: float, gathered: Gathered, *, drawn: int, epsilon: float | None
) -> RoundRecord:
    told: dict[str, object] = {
        "round_number": number,
        "seconds": seconds,
        "extensions": gathered.extensions,
        "epsilon": epsilon,
    }
    if epsilon is None:
        count = gathered.total.count
        told |= {
            "bytes_down": gathered.bytes_down,
            "bytes_up": gathered.bytes_up,
            "drawn": drawn,
            "count": count,
            "refused": len(gathered.refused),
            "rejected": tuple(gathered.rejected),
            "mean_loss": gathered.loss_sum / count if count else None,
        }
    return RoundRecord.model_validate(told)


def _first_state(job: Job, owners: Owners, data_id: str | None) -> RunState:
    config, privacy = job.config, job.config.privacy
    population = identify(owners)
    rate = sampling_rate(expected_size=config.cohort.expected_size, population=population.size)
    noise_multiplier, sampling_key = 0.0, None
    if privacy.epsilon is not None and privacy.delta is not None:
        noise_multiplier = noise_multiplier_for(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=rate,
            rounds=config.rounds,
        )
        sampling_key = secrets.token_hex(KEY_BYTES)
    info = RunInfo(
        run_id=secrets.token_hex(8),
        round_number=0,
        config=config,
        bundle_id=job.bundle_id,
        layout_id=job.layout.id,
        data_id=data_id,
        population=population,
        noise_multiplier=noise_multiplier,
        sampling_key=sampling_key,
        versions=_versions(),
        history=(),
    )
    theta = job.initial_theta.astype(np.float32)
    return RunState(
        info=info, theta=theta, optimizer=make_optimizer(config.server).init(theta.size)
    )


@contextmanager
def _open_ledger(job: Job, info: RunInfo, folder: RunFolder) -> Iterator[Ledger | None]:
    """The run's ledger, checked against its checkpoint; None in mode ``none``."""
    privacy = job.config.privacy
    if privacy.epsilon is None or privacy.delta is None:
        yield None
        return
    ledger = Ledger(
        folder.path / LEDGER_NAME,
        run_id=info.run_id,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
    )
    with closing(ledger):
        ledger.check_covers(info.round_number)
        yield ledger


def _check_population(info: RunInfo, owners: Owners, data_id: str | None, folder: Path) -> None:
    found = identify(owners)
    if info.data_id != data_id:
        raise CheckpointError(
            f"{folder}: expected the data set {info.data_id} of the run that is resumed, "
            f"got {data_id}. Use the same data set, or start a new run in another folder."
        )
    if info.population != found:
        raise CheckpointError(
            f"{folder}: expected the population of the run that is resumed "
            f"({info.population.size} devices, {info.population.digest[:12]}), got "
            f"{found.size} devices, {found.digest[:12]}. Bring the same devices, or start a new "
            "run in another folder."
        )


def _result(folder: RunFolder, state: RunState, *, already_finished: bool) -> RunResult:
    info = state.info
    return RunResult(
        info=info,
        theta=state.theta,
        theta_path=folder.release_path(info.round_number),
        epsilon=info.history[-1].epsilon,
        already_finished=already_finished,
    )


def _versions() -> dict[str, str]:
    packages = ("carpool", "flwr", "numpy", "opacus")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
