"""Whether a plan is sensible, and what would make it so."""

from __future__ import annotations

import dataclasses
import math

from carpool.errors import PrivacyError
from carpool_server.privacy.planning.evidence import COSTLY, SENSIBLE, Band, band_of
from carpool_server.privacy.planning.plan import Plan


def advice(plan: Plan) -> str:
    """One sentence: the verdict, what it rests on, and each single change that would do.

    Every change is computed with the accountant, others kept: a larger cohort with its population
    in proportion, fewer values, fewer rounds (or participations) at the same epsilon, a larger
    epsilon. What it rests on is 60 rounds of one data set (``evidence``).
    """
    ratio, band = plan.noise_to_signal, band_of(plan.noise_to_signal)
    text = (
        f"This plan is {band.name}: a round's noise is {ratio:.2g} times the largest mean, where "
        f"the ATT&CK study kept {_kept(band)} of the gain over zero-shot"
    )
    if band is SENSIBLE:
        return f"{text}."
    return f"{text}; for {SENSIBLE.up_to:g}, with {_kept(SENSIBLE)} kept, take {_changes(plan)}."


def _kept(band: Band) -> str:
    if band is SENSIBLE:
        return f"at least {band.kept_least:.0%}"
    between = f"{band.kept_least:.0%} to {band.kept_most:.0%}"
    # nothing was measured between the bands, so below the costly ones' first only they can speak
    return f"only {between}" if band is COSTLY else f"{between} or less"


def _changes(plan: Plan) -> str:
    """What brings the noise down to ``SENSIBLE``, one change at a time."""
    cohort = math.ceil(plan.noise_cohort * plan.noise_to_signal / SENSIBLE.up_to)
    population = math.ceil(plan.noise_population * cohort / plan.noise_cohort)
    values = math.floor(plan.num_values * (SENSIBLE.up_to / plan.noise_to_signal) ** 2)
    changes = [
        f"a cohort of {cohort:,} from a population of {population:,}",
        f"at most {values:,} values" if values else None,
        _fewer_rounds(plan),
        _larger_epsilon(plan),
    ]
    *most, last = [change for change in changes if change is not None]
    return f"{', '.join(most)} or {last}"


def _quiet(plan: Plan) -> Plan:
    """The plan with just so much noise that it is sensible."""
    factor = SENSIBLE.up_to / plan.noise_to_signal
    return dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * factor)


def _fewer_rounds(plan: Plan) -> str | None:
    """The most rounds, or participations, with little noise at the epsilon of this plan."""
    budget, quiet = plan.epsilon_after(plan.rounds).value, _quiet(plan)
    short, enough = plan.max_participations or plan.rounds, 0
    while short - enough > 1:
        middle = (short + enough) // 2
        if _epsilon_of_quiet(quiet, middle) <= budget:
            enough = middle
        else:
            short = middle
    if enough == 0:
        return None
    what = "rounds" if plan.max_participations is None else "participations"
    return f"at most {enough:,} {what}"


def _epsilon_of_quiet(quiet: Plan, count: int) -> float:
    """Infinite where none can be stated."""
    capped = quiet.max_participations is not None
    changed = dataclasses.replace(quiet, max_participations=count) if capped else quiet
    try:
        return changed.epsilon_after(quiet.rounds if capped else count).value
    except PrivacyError:
        return math.inf


def _larger_epsilon(plan: Plan) -> str | None:
    needed = _epsilon_of_quiet(_quiet(plan), plan.max_participations or plan.rounds)
    return None if math.isinf(needed) else f"epsilon {needed:.3g}"
