"""One round: draw, gather, charge, noise, step, checkpoint, release, tell."""

from __future__ import annotations

import dataclasses
import secrets
import time

from carpool.protocol import TaskHeader
from carpool_server.books import Books
from carpool_server.checkpoint import Ending, RunFolder, RunInfo, RunState
from carpool_server.exchange import Exchange
from carpool_server.gather import Gathered, Gathering, Owners
from carpool_server.hooks import RoundRecord
from carpool_server.job import Job
from carpool_server.privacy.ledger import Charge
from carpool_server.privacy.mechanism import Mechanism
from carpool_server.privacy.metrics import RoundMetrics
from carpool_server.promise import charge_of, metric_bounds, recipe_of, round_mechanism
from carpool_server.release import check_step, release
from carpool_server.sampling import PoissonSampler, derived_key, sampling_rate
from carpool_server.step import step_with


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

    stepped = step_with(total, state, mechanism=planned.mechanism, config=config)
    # before the checkpoint: one that is durable can be resumed
    check_step(stepped.theta, info, job=job, ledger=around.books.ledger)
    job.audit.reached(number, "stepped")

    record = _record(
        task,
        gathered,
        mode_told=config.privacy.mode,
        seconds=time.monotonic() - start,
        epsilon=epsilon,
        metrics=stepped.metrics,
    )
    books = around.books
    new_info = info.model_copy(
        update={
            "round_number": number,
            "clip_norm": stepped.clip_norm,
            "history": (*info.history, record),
            "contributors": len(contributors),
            "largest_participation": books.largest_participation(),
            "participations": 0 if participation is None else participation.total(),
            "ledger_head": None if books.ledger is None else books.ledger.head,
        }
    )
    new_state = RunState(info=new_info, theta=stepped.theta, optimizer=stepped.optimizer)
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
