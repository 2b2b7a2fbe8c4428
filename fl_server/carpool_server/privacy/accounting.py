"""Epsilon of a Poisson-subsampled Gaussian, composed over rounds (Opacus's PRV accountant).

Mechanism: every round draws each client of the registered population independently with
probability q, adds their clipped updates and Gaussian noise of z times the clip. Unit: one
client, over all rounds. Neighbouring: one client's updates become zero (the same sums as if the
client were added or removed, since an update of zero adds nothing and the mean's denominator is
fixed). Amplification by sampling is claimed because the server itself draws the cohorts, with
a key that stays secret, from a population that is fixed for the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np

from carpool.errors import PrivacyError

METHOD = "PRV (Opacus), Poisson-subsampled Gaussian, unit: one client, upper bound"
"""How epsilon was computed: stands beside every epsilon that is reported."""

EPSILON_ERROR = 0.01
"""The accountant's own error bound; its upper end is what is reported."""

SMALLEST_EPSILON = 0.05
"""Targets near the accountant's own error cannot be searched for."""


def epsilon_spent(charges: Iterable[tuple[float, float]], *, delta: float) -> float:
    """Epsilon of the given rounds, composed.

    Guarantees: an upper bound, by at most twice ``EPSILON_ERROR`` and a share of 1/1000 of
    delta above the true value (Gopi, Lee and Wutschitz, 2021, arXiv 2106.02848).

    Args:
        charges: (noise multiplier, sampling rate) of every release, in order; none cost 0.
        delta: in (0, 1).
    """
    history = [(z, q, len(list(same))) for (z, q), same in groupby(charges)]
    if not history:
        return 0.0
    from opacus.accountants import PRVAccountant  # noqa: PLC0415  takes seconds, brings torch

    accountant = PRVAccountant()
    accountant.history = history
    with _quiet():
        return float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR))


def noise_multiplier_for(
    *, epsilon: float, delta: float, sampling_rate: float, rounds: int
) -> float:
    """The noise multiplier z with which ``rounds`` releases cost at most ``epsilon``.

    Guarantees: ``epsilon_spent`` of those releases is at most ``epsilon`` and within 0.01 of
    it; equal arguments give an equal z.

    Args:
        epsilon: the budget over all rounds.
        delta: in (0, 1).
        sampling_rate: q, expected cohort over population, in (0, 1].
        rounds: releases.

    Raises:
        PrivacyError: the target is below ``SMALLEST_EPSILON``, or no noise is large enough.
    """
    if epsilon < SMALLEST_EPSILON:
        raise PrivacyError(
            f"privacy.epsilon: expected at least {SMALLEST_EPSILON}, since the accountant is "
            f"exact to {EPSILON_ERROR} only, got {epsilon}."
        )
    from opacus.accountants.utils import get_noise_multiplier  # noqa: PLC0415  as above

    try:
        with _quiet():
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sampling_rate,
                    steps=rounds,
                    accountant="prv",
                    eps_error=EPSILON_ERROR,
                )
            )
    except ValueError as error:
        raise PrivacyError(
            f"no noise is large enough for epsilon {epsilon} at delta {delta} over {rounds} "
            f"rounds at sampling rate {sampling_rate:.4f}: {error} Raise epsilon."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus takes log(0) at q = 1 and finds a first domain by an RDP bound that warns."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield
