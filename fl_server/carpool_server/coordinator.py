"""A run's rounds, one after the other, each released once."""

from __future__ import annotations

import platform
import secrets
from importlib.metadata import version
from pathlib import Path

from flwr.serverapp import Grid

from carpool.errors import CheckpointError, PrivacyError
from carpool_server.books import Books, history_of, ledger_path_of, open_books
from carpool_server.checkpoint import RunFolder, RunInfo, RunState
from carpool_server.exchange import Exchange
from carpool_server.gather import Owners
from carpool_server.job import Job, RunResult
from carpool_server.optimizers import make_optimizer
from carpool_server.population import identify, register
from carpool_server.privacy.accounting import rounded_up
from carpool_server.promise import noise_multiplier_of, round_mechanism
from carpool_server.release import release
from carpool_server.round import PlannedRound, Surroundings, plan_round, run_round
from carpool_server.sampling import KEY_BYTES, sampling_rate
from carpool_server.statement import ENDINGS


def run_rounds(grid: Grid, job: Job, folder: RunFolder) -> RunResult:
    """Runs all rounds that are left, each released once.

    A round's order is what makes a crash harmless: room in the budget; exact sum; charge
    durable in the ledger; noise; server step; checkpoint, atomic; release marked in the
    ledger; release; hooks. Before the checkpoint nothing of the round exists outside this
    process, so the round is done again: with the same devices and the same sum, a charge that
    is not repeated, and fresh noise. After it the checkpoint has the released theta, and only
    the mark, its file and the hooks may be left to do.

    A run whose next round has no room in the budget, or for which too few devices are below
    their cap, ends there, before any device is asked; ``RunResult.info.ended`` says so.

    Args:
        grid: Flower's.
        job: what to run.
        folder: the run's, opened for this job.

    Raises:
        RoundFailed: aggregators that never registered, or a round below its quorum.
        ContributionRejected: an aggregator with another bundle, layout or data set.
        ConfigError: a cohort that is larger than the population.
        CheckpointError: another population than the checkpoint's.
        PrivacyError: a budget or caps that leave no room for a first round, that the run ended
            at before, or that cannot be met; nothing was released.
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
    ledger_path = ledger_path_of(folder.path, job.ledger_path, job.config)
    if state is None:
        state = _first_state(job, owners, data_id, ledger_path)
        folder.write(state)
        job.audit.reached(0, "checkpointed")
    else:
        _check_population(state.info, owners, data_id, folder.path)
    with open_books(ledger_path, job.config, state.info) as books:
        if state.info.round_number:
            release(job, folder, state, books, refused={})
        around = Surroundings(job=job, folder=folder, exchange=exchange, owners=owners, books=books)
        while not state.info.finished:
            planned = plan_round(around, state)
            if planned.ending is None:
                state = run_round(around, state, planned)
                continue
            if state.info.round_number == 0:
                raise PrivacyError(_no_room(job, books, planned))
            info = state.info.model_copy(update={"ended": planned.ending})
            state = RunState(info=info, theta=state.theta, optimizer=state.optimizer)
            folder.write(state)
            folder.release(state, layout=job.layout)  # now it is the last one, which is kept
    return _result(folder, state, already_finished=False)


def finished(job: Job, folder: RunFolder) -> RunResult:
    """The result of a folder whose run is over; its last release is made good if it was cut off.

    Raises:
        CheckpointError: the run is not over.
        PrivacyError: its ledger is not the run's, or it ended at its budget or caps: there is
            nothing to go on with.
    """
    state = folder.state
    if state is None or not state.info.finished:
        raise CheckpointError(f"{folder.path}: expected a finished run.")
    info = state.info
    with open_books(
        ledger_path_of(folder.path, job.ledger_path, job.config), job.config, info
    ) as books:
        release(job, folder, state, books, refused={})
    if info.ended is not None:
        epsilon = info.history[-1].epsilon
        spent = "" if epsilon is None else f", epsilon {rounded_up(epsilon, 3)}"
        raise PrivacyError(
            f"{folder.path}: the run ended at its {ENDINGS[info.ended]} after round "
            f"{info.round_number} of {info.config.rounds}{spent}. What it released stays; no other "
            "round may be run."
        )
    return _result(folder, state, already_finished=True)


def _no_room(job: Job, books: Books, planned: PlannedRound) -> str:
    if planned.ending == "budget" and books.ledger is not None and planned.charge is not None:
        return f"{books.ledger.book.path}: {books.ledger.refusal(planned.charge)}"
    return (
        f"expected at least {job.config.cohort.expected_size:g} devices below their cap of "
        f"{books.cap} rounds, which a round expects, got {len(planned.devices)}. Lower "
        "cohort.expected_size, or bring more devices."
    )


def _first_state(job: Job, owners: Owners, data_id: str | None, ledger_path: Path) -> RunState:
    config = job.config
    population = identify(owners)
    # refuses a cohort that is larger than the population
    sampling_rate(expected_size=config.cohort.expected_size, population=population.size)
    num_values = round_mechanism(
        config, num_values=job.layout.num_values, noise_multiplier=0.0
    ).num_values
    noise_multiplier = noise_multiplier_of(
        config,
        population=population.size,
        num_values=num_values,
        history=history_of(ledger_path, config, population=population.digest),
    )
    # refuses noise that leaves nothing for theta, or that the sampler cannot draw
    round_mechanism(config, num_values=job.layout.num_values, noise_multiplier=noise_multiplier)
    secret = config.privacy.mode == "central"
    info = RunInfo(
        run_id=secrets.token_hex(8),
        round_number=0,
        config=config,
        bundle_id=job.bundle_id,
        layout_id=job.layout.id,
        data_id=data_id,
        population=population,
        noise_multiplier=noise_multiplier,
        clip_norm=config.privacy.clip_norm,
        sampling_key=secrets.token_hex(KEY_BYTES) if secret else None,
        versions=_versions(),
        history=(),
    )
    theta = job.initial_theta.astype("float32")
    return RunState(
        info=info, theta=theta, optimizer=make_optimizer(config.server).init(theta.size)
    )


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
        epsilon=info.history[-1].epsilon if info.history else None,
        already_finished=already_finished,
    )


def _versions() -> dict[str, str]:
    packages = ("carpool", "flwr", "numpy", "opacus", "dp-accounting")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
