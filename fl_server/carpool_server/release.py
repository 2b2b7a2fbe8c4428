"""The end of a round: a theta that may leave, marked before it does, and told."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from carpool.errors import Refusal, ThetaError
from carpool_server.books import Books
from carpool_server.checkpoint import RunFolder, RunInfo, RunState
from carpool_server.hooks import RoundFacts
from carpool_server.job import Job
from carpool_server.privacy.ledger import Ledger


def check_step(
    theta: NDArray[np.float32], info: RunInfo, *, job: Job, ledger: Ledger | None
) -> None:
    """Refuses a theta that is no longer finite; where the ledger charged it, it is released.

    That it diverged is told, and depends on the sum: with new noise the same sum would be
    released again.

    Args:
        theta: after the server's step.
        info: of the round before.
        job: has the layout.
        ledger: where there is one.

    Raises:
        ThetaError: names the round; where there is a ledger, nothing else about the sum.
    """
    number = info.round_number + 1
    try:
        job.layout.check(theta, source=f"round {number}: theta after the server's step")
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


def _digest(theta: NDArray[np.float32]) -> str:
    return hashlib.sha256(theta.astype("<f4").tobytes()).hexdigest()
