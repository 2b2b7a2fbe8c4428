"""Whether a plan is sensible, and what would make it so."""

from __future__ import annotations

import dataclasses
import math

from carpool.errors import PrivacyError
from carpool_server.privacy.planning.evidence import COSTLY, SENSIBLE, Band, band_of
from carpool_server.privacy.planning.plan import Plan

WEAK_EPSILON = 10.0
"""Above it formal guarantees are called weak: Ponomareva et al. (2023), arXiv 2303.00654."""


def advice(plan: Plan) -> str:
    """One sentence: the verdict, what it rests on, and each single change that would do.

    Every change is computed with the accountant, others kept: a larger cohort with its population
    in proportion, fewer values, fewer rounds (or participations) at the same epsilon, a larger
    epsilon up to ``WEAK_EPSILON``. What it rests on is 60 rounds of one data set (``evidence``).
    """
    epsilon = plan.epsilon_after(plan.rounds).value
    if epsilon > WEAK_EPSILON:
        return (
            f"This plan is not sensible: epsilon {epsilon:.3g} is above {WEAK_EPSILON:g}, beyond "
            "which the promise is weak; plan for a smaller one."
        )
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
    return f"only {between}" if band is COSTLY else f"{between} or less"


def _changes(plan: Plan) -> str:
    """What brings the noise down to ``SENSIBLE``, one change at a time, and what cannot."""
    cohort = math.ceil(plan.noise_cohort * plan.noise_to_signal / SENSIBLE.up_to)
    population = math.ceil(plan.noise_population * cohort / plan.noise_cohort)
    values = math.floor(plan.num_values * (SENSIBLE.up_to / plan.noise_to_signal) ** 2)
    what = "rounds" if plan.max_participations is None else "participations"
    changes = {
        "a larger cohort": f"a cohort of {cohort:,} from a population of {population:,}",
        "fewer values": f"at most {values:,} values" if values else None,
        f"fewer {what}": _fewer(plan, what),
        "a larger epsilon": _larger_epsilon(plan),
    }
    *most, last = [change for change in changes.values() if change is not None]
    text = f"{', '.join(most)} or {last}" if most else last
    if useless := [name for name, change in changes.items() if change is None]:
        text += f" ({' or '.join(useless)} alone cannot do it)"
    return text


def _quiet(plan: Plan) -> Plan:
    """The plan with just so much noise that it is sensible."""
    factor = SENSIBLE.up_to / plan.noise_to_signal
    return dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * factor)


def _fewer(plan: Plan, what: str) -> str | None:
    """The most rounds, or participations, with little noise at the epsilon of this plan."""
    budget, quiet = plan.epsilon_after(plan.rounds).value, _quiet(plan)
    if _epsilon_of_quiet(quiet, 1) > budget:
        return None
    short, enough = plan.max_participations or plan.rounds, 1
    while short - enough > 1:
        middle = (short + enough) // 2
        if _epsilon_of_quiet(quiet, middle) <= budget:
            enough = middle
        else:
            short = middle
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
    return f"epsilon {needed:.3g}" if needed <= WEAK_EPSILON else None
