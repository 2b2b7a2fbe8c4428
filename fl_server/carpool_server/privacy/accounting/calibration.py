"""The least noise that keeps a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from carpool.errors import PrivacyError
from carpool.gaussian import LARGEST_SCALE
from carpool.protocol import GRID_BITS
from carpool_server.privacy.accounting.composition import epsilon_at_cap, epsilon_of
from carpool_server.privacy.accounting.prv import EPSILON_ERROR, SMALLEST_EPSILON
from carpool_server.privacy.accounting.releases import Epsilon, Method, Release, check_delta

TOLERANCE = 1e-4
"""Relative: a noise multiplier smaller by this would pass the budget."""

_SMALLEST_MULTIPLIER, _LARGEST_MULTIPLIER = 2.0**-10, 2.0**20

_STEP = 1.25
"""Between the multipliers that are tried first: small noise makes the accountant slow."""

_WithNew = Callable[[float], list[Release]]
"""History and the new releases, at a noise multiplier."""


def calibrate(
    *,
    epsilon: float,
    delta: float,
    rounds: int,
    sampling_rate: float = 1.0,
    max_participations: int | None = None,
    num_values: int,
    history: Sequence[Release] = (),
    noise_share: float = 1.0,
) -> float:
    """The least noise multiplier z with which ``rounds`` further releases keep the budget.

    Guarantees: history and new releases together cost at most ``epsilon``, by ``epsilon_of``
    (method ``"prv"``), or, with ``max_participations``, by ``epsilon_at_cap`` (method
    ``"gaussian"``), whose docstrings state relation and slack; with a z smaller by 1e-4 of
    itself they do not, or no epsilon can be stated (up to the accountant's numerical noise).
    Equal arguments give an equal z.

    Args:
        epsilon: the budget, history included.
        delta: in (0, 1).
        rounds: releases still to come, 1 or more.
        sampling_rate: their q, in (0, 1]; has no effect with a cap.
        max_participations: the cap; None for the regime in which the server samples.
        num_values: how many integers each release adds noise to.
        history: what was released to the same population before.
        noise_share: the largest share of ``1 / z**2`` that any one block of a release has: its
            noise has the standard deviation ``z / sqrt(noise_share)``, the least of all. 1 is
            always right, and costs nothing to speak of.

    Raises:
        PrivacyError: history leaves nothing, the target is below what the accountant resolves,
            no noise is large enough, or an argument is out of range.
    """
    _check(epsilon=epsilon, delta=delta, rounds=rounds, noise_share=noise_share)
    before = list(history)

    def with_new(z: float) -> list[Release]:
        scale = min(LARGEST_SCALE, round(math.ldexp(z / math.sqrt(noise_share), GRID_BITS)))
        new = Release(
            noise_multiplier=z, sampling_rate=sampling_rate, num_values=num_values, scale=scale
        )
        return [*before, *[new] * rounds]

    with_new(1.0)  # refuses a sampling rate or number of values out of range
    if max_participations is None:
        spent, found = _sampled(before, with_new, epsilon=epsilon, delta=delta)
    else:
        spent, found = _capped(
            before, with_new, epsilon=epsilon, delta=delta, max_participations=max_participations
        )
    if found is None:
        raise PrivacyError(
            f"no noise multiplier up to {_LARGEST_MULTIPLIER:g} is large enough for epsilon "
            f"{epsilon:g} at delta {delta:g} over {rounds} rounds after {spent:.4g} was spent. "
            "Raise epsilon or delta, or run fewer rounds."
        )
    return found


def _sampled(
    before: list[Release], with_new: _WithNew, *, epsilon: float, delta: float
) -> tuple[float, float | None]:
    """What was spent, and the least noise for the rest."""
    if epsilon < SMALLEST_EPSILON:
        raise PrivacyError(
            f"privacy.epsilon: expected at least {SMALLEST_EPSILON}, since the accountant is "
            f"exact to {EPSILON_ERROR} only, got {epsilon}."
        )

    def spend(z: float, method: Method = "prv") -> float:
        return _or_infinite(lambda: epsilon_of(with_new(z), delta=delta, method=method))

    spent = epsilon_of(before, delta=delta).value
    _check_left(spent, epsilon=epsilon, delta=delta, resolution=EPSILON_ERROR)
    # RDP takes milliseconds and is a little above: its answer is where PRV's search starts
    start = _least(lambda z: spend(z, "rdp"), budget=epsilon, start=1.0, tolerance=0.05)
    return spent, _least(spend, budget=epsilon, start=start or 1.0)


def _capped(
    before: list[Release],
    with_new: _WithNew,
    *,
    epsilon: float,
    delta: float,
    max_participations: int,
) -> tuple[float, float | None]:
    """The same for the worst of history and new releases, as many as the cap allows."""

    def spend(releases: list[Release]) -> Epsilon:
        return epsilon_at_cap(releases, delta=delta, max_participations=max_participations)

    spent = spend(before).value
    _check_left(spent, epsilon=epsilon, delta=delta, resolution=0.0)
    found = _least(lambda z: _or_infinite(lambda: spend(with_new(z))), budget=epsilon, start=1.0)
    return spent, found


def _or_infinite(epsilon: Callable[[], Epsilon]) -> float:
    """An epsilon that cannot be stated keeps no budget."""
    try:
        return epsilon().value
    except PrivacyError:
        return math.inf


def _least(
    spend: Callable[[float], float],
    *,
    budget: float,
    start: float,
    tolerance: float = TOLERANCE,
) -> float | None:
    """The least z, to the tolerance, at which ``spend`` is within the budget; None: there is none.

    Only a z that was tried is returned. Epsilon is close to a power of z, so a guess between two
    that were tried is mostly right; every third step halves the interval, whatever the guesses do.
    """
    enough = start
    while (high := spend(enough)) > budget:
        enough *= _STEP
        if enough > _LARGEST_MULTIPLIER:
            return None
    short = enough / _STEP
    while (low := spend(short)) <= budget:
        enough, high, short = short, low, short / _STEP
        if enough < _SMALLEST_MULTIPLIER:
            return enough
    step, above = 0, True
    while enough > short * (1 + tolerance):
        step += 1
        tried = math.sqrt(enough * short)
        if step % 3 and high > 0 and math.isfinite(low):
            share = math.log(low / budget) / math.log(low / high)
            # to one side of the guess, then the other: if it is right, these are the answer
            nudge = 1 + tolerance / 3 if above else 1 - tolerance / 3
            guess = short * (enough / short) ** share * nudge
            tried = guess if short < guess < enough else tried
        spent = spend(tried)
        above = spent > budget
        if above:
            short, low = tried, spent
        else:
            enough, high = tried, spent
    return enough


def _check(*, epsilon: float, delta: float, rounds: int, noise_share: float) -> None:
    check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"privacy.epsilon: expected a number above 0, got {epsilon}.")
    if rounds < 1:
        raise PrivacyError(f"rounds: expected at least 1, got {rounds}.")
    if not 0 < noise_share <= 1:
        raise PrivacyError(f"noise share: expected above 0 and at most 1, got {noise_share}.")


def _check_left(spent: float, *, epsilon: float, delta: float, resolution: float) -> None:
    """Refuses where nothing is left that the accountant could tell from nothing."""
    if spent > epsilon - resolution:
        raise PrivacyError(
            f"privacy.epsilon: earlier releases of this population spent {spent:.4f} of "
            f"{epsilon:g} at delta {delta:g}, which leaves nothing for further rounds. Stop here; "
            "a larger epsilon is another promise."
        )
