"""One round: draw, gather, charge, noise, step, checkpoint, release, tell."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time

import numpy as np
from numpy.typing import NDArray

from carpool.errors import Refusal, ThetaError
from carpool.protocol import TaskHeader
from carpool_server.aggregation import blocks_of
from carpool_server.books import Books
from carpool_server.checkpoint import Ending, RunFolder, RunInfo, RunState
from carpool_server.exchange import Exchange
from carpool_server.gather import Gathered, Gathering, Owners
from carpool_server.hooks import RoundFacts, RoundRecord
from carpool_server.job import Job
from carpool_server.optimizers import make_optimizer, rate_at
from carpool_server.privacy.clipping import grid_step
from carpool_server.privacy.ledger import Charge
from carpool_server.privacy.mechanism import Mechanism, next_clip
from carpool_server.privacy.metrics import RoundMetrics, decode_metrics
from carpool_server.promise import charge_of, metric_bounds, recipe_of, round_mechanism
from carpool_server.sampling import PoissonSampler, derived_key, sampling_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run's rounds have in common.

    Attributes:
        job: what is run.
        folder: the run's.
        exchange: to the aggregators.
        owners: who speaks for whom.
        books: the population's.
    """

    job: Job
    folder: RunFolder
    exchange: Exchange
    owners: Owners
    books: Books


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRound:
    """A round before any device is asked.

    Attributes:
        number: 1 or more.
        devices: who may be drawn.
        mechanism: the noise.
        charge: its price; None where the ledger holds nothing.
        ending: why it must not be run.
    """

    number: int
    devices: list[str]
    mechanism: Mechanism
    charge: Charge | None
    ending: Ending | None


def plan_round(around: Surroundings, state: RunState) -> PlannedRound:
    """The next round, and whether promise and caps allow it."""
    info, config, books = state.info, around.job.config, around.books
    number = info.round_number + 1
    devices = books.eligible(list(around.owners), run_id=info.run_id, number=number)
    mechanism = round_mechanism(
        config, num_values=state.theta.size, noise_multiplier=info.noise_multiplier
    )
    charge: Charge | None = None
    ending: Ending | None = None
    if books.cap is not None and len(devices) < config.cohort.expected_size:
        ending = "participation-cap"
    if books.ledger is not None:
        charge = charge_of(
            config,
            run_id=info.run_id,
            round_number=number,
            clip_norm=info.clip_norm,
            mechanism=mechanism,
            population=info.population.size,
        )
        if not books.ledger.affords(charge):
            ending = "budget"
    return PlannedRound(
        number=number, devices=devices, mechanism=mechanism, charge=charge, ending=ending
    )


def run_round(around: Surroundings, state: RunState, planned: PlannedRound) -> RunState:
    """Runs a planned round to its release.

    Raises:
        RoundFailed: below its quorum after the last extension.
        PrivacyError: a charge that the ledger refuses; nothing was released.
        RunStopped: the run was asked to stop.
    """
    job, config, info, number = around.job, around.job.config, state.info, planned.number
    start = time.monotonic()
    task = _task(around, info, planned)
    participation = around.books.participation
    if participation is not None and task.participations is not None:
        # devices add their noise themselves, and new noise whenever they are asked
        participation.add(
            task.device_ids,
            run_id=info.run_id,
            round_number=number,
            attempt=secrets.token_hex(8),
        )
    gathered = Gathering(
        around.exchange, task=task, theta=state.theta, owners=around.owners, rules=config.cohort
    ).run()
    total = gathered.total.values
    contributors = tuple(sorted(gathered.device_ids))
    job.audit.summed(number, total.copy(), contributors)
    job.audit.reached(number, "summed")

    epsilon = None
    if participation is not None and task.participations is None:
        participation.add(contributors, run_id=info.run_id, round_number=number)
    job.audit.reached(number, "counted")
    if around.books.ledger is not None and planned.charge is not None:
        epsilon = around.books.ledger.charge(planned.charge).value
    job.audit.reached(number, "charged")
    total += planned.mechanism.noise()
    job.audit.reached(number, "noised")

    noised = blocks_of(total, planned.mechanism.sizes)
    # the denominator is fixed: it tells nothing about who was there
    unit = grid_step(info.clip_norm) / config.cohort.expected_size
    with np.errstate(over="ignore", invalid="ignore"):  # what comes out is looked at
        theta, optimizer = make_optimizer(config.server).step(
            state.theta,
            noised["theta"].astype(np.float64) * unit,
            state.optimizer,
            rate=rate_at(number, rounds=config.rounds, config=config.server),
        )
    _check_step(around, info, planned, theta)  # before the checkpoint: that can be resumed
    clip_norm = info.clip_norm
    if config.privacy.adaptive_clip is not None:
        clip_norm = next_clip(
            clip_norm,
            noised_bits=int(noised["norm_bit"][0]),
            config=config.privacy.adaptive_clip,
            expected_size=config.cohort.expected_size,
        )
    bounds, metrics = metric_bounds(config.privacy), None
    if bounds is not None:
        multiplier = planned.mechanism.multiplier("metrics")
        metrics = decode_metrics(noised["metrics"], noise_multiplier=multiplier, bounds=bounds)
    job.audit.reached(number, "stepped")

    record = _record(
        task,
        gathered,
        mode_told=config.privacy.mode,
        seconds=time.monotonic() - start,
        epsilon=epsilon,
        metrics=metrics,
    )
    books = around.books
    new_info = info.model_copy(
        update={
            "round_number": number,
            "clip_norm": clip_norm,
            "history": (*info.history, record),
            "contributors": len(contributors),
            "largest_participation": books.largest_participation(),
            "participations": 0 if participation is None else participation.total(),
            "ledger_head": None if books.ledger is None else books.ledger.head,
        }
    )
    new_state = RunState(info=new_info, theta=theta, optimizer=optimizer)
    around.folder.write(new_state)
    job.audit.reached(number, "checkpointed")
    release(
        job,
        around.folder,
        new_state,
        books,
        refused={} if config.privacy.mode == "central" else gathered.refused,
    )
    return new_state


def _check_step(
    around: Surroundings, info: RunInfo, planned: PlannedRound, theta: NDArray[np.float32]
) -> None:
    """Refuses a theta that is no longer finite; noised, it counts as released.

    That it diverged is told, and depends on the sum: with new noise the same sum would be
    released again.
    """
    number, ledger = planned.number, around.books.ledger
    try:
        around.job.layout.check(theta, source=f"round {number}: theta after the server's step")
    except ThetaError:
        if ledger is None:
            raise
        ledger.mark_released(
            info.run_id,
            number,
            theta=_digest(theta),
            contributors=0,
            largest_participation=info.largest_participation,
        )
        raise ThetaError(
            f"round {number}: expected a finite theta after the server's step, got one that is "
            "not. The round is charged and counts as released, so this run cannot go on. Lower "
            "server.learning_rate in a new one."
        ) from None


def release(
    job: Job, folder: RunFolder, state: RunState, books: Books, *, refused: dict[str, Refusal]
) -> None:
    """Makes a checkpointed round known. May be done again: the files are there or made."""
    info, number = state.info, state.info.round_number
    if books.ledger is not None:
        books.ledger.mark_released(
            info.run_id,
            number,
            theta=_digest(state.theta),
            contributors=info.contributors,
            largest_participation=info.largest_participation,
        )
    job.audit.reached(number, "marked")
    folder.release(state, layout=job.layout)
    job.audit.reached(number, "released")
    theta = state.theta.copy()
    theta.flags.writeable = False
    facts = RoundFacts(
        round_number=number,
        rounds=info.config.rounds,
        theta=theta,
        record=info.history[-1],
        refused=refused,
    )
    for hook in job.hooks:
        hook.after_round(facts)
    job.audit.reached(number, "hooked")


def _task(around: Surroundings, info: RunInfo, planned: PlannedRound) -> TaskHeader:
    config, books = info.config, around.books
    key = (
        bytes.fromhex(info.sampling_key)
        if info.sampling_key is not None
        else derived_key(config.seed, purpose="carpool/1/cohort-key")
    )
    # with a cap nothing is claimed for the draw, so the cohort need not shrink with the eligible
    rate = sampling_rate(expected_size=config.cohort.expected_size, population=len(planned.devices))
    drawn = PoissonSampler(rate=rate, key=key).draw(planned.devices, round_number=planned.number)
    participations = None
    if config.privacy.mode == "example_level" and books.participation is not None:
        counts = books.participation.counts(without=(info.run_id, planned.number))
        participations = {device: counts.get(device, 0) for device in drawn}
    return TaskHeader(
        run_id=info.run_id,
        round_number=planned.number,
        bundle_id=info.bundle_id,
        layout_id=info.layout_id,
        recipe=recipe_of(config),
        order_key=derived_key(config.seed, purpose="carpool/1/order-key").hex(),
        clip_norm=info.clip_norm,
        device_ids=drawn,
        report_loss=config.privacy.mode in {"none", "projection"},
        norm_bit=config.privacy.adaptive_clip is not None,
        metrics=metric_bounds(config.privacy),
        participations=participations,
    )


def _record(
    task: TaskHeader,
    gathered: Gathered,
    *,
    mode_told: str,
    seconds: float,
    epsilon: float | None,
    metrics: RoundMetrics | None,
) -> RoundRecord:
    told: dict[str, object] = {
        "round_number": task.round_number,
        "seconds": seconds,
        "extensions": gathered.extensions,
        "epsilon": epsilon,
        "clip_norm": task.clip_norm,
        "metrics": metrics,
    }
    if mode_told != "central":
        count = gathered.total.count
        told |= {
            "bytes_down": gathered.bytes_down,
            "bytes_up": gathered.bytes_up,
            "drawn": len(task.device_ids),
            "count": count,
            "refused": len(gathered.refused),
            "rejected": tuple(gathered.rejected),
            "mean_loss": gathered.loss_sum / count if count and task.report_loss else None,
        }
    return RoundRecord.model_validate(told)


def _digest(theta: NDArray[np.float32]) -> str:
    return hashlib.sha256(theta.astype("<f4").tobytes()).hexdigest()
