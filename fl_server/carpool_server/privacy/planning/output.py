"""A plan as tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from carpool_server.privacy.accounting import Epsilon
from carpool_server.privacy.planning.advice import advice
from carpool_server.privacy.planning.plan import Plan

_UNITS = {
    "poisson": "one client: all of its data, over all rounds",
    "participation-cap": "one client, as the cap knows it: all of its data, over all rounds",
}


def print_plan(
    plan: Plan,
    epsilons: Sequence[tuple[int, Epsilon]],
    *,
    sources: Mapping[str, str],
    console: Console,
) -> None:
    """Settings with where each came from, epsilon over rounds, the verdict.

    Every line of a projection says that it is one, and of which population.

    Args:
        plan: what to print.
        epsilons: by rounds, in order.
        sources: setting -> "given", or what the default is taken from.
        console: where to.
    """
    note = label(plan)
    settings = Table(title="Plan" if note is None else f"Plan: {note}", title_justify="left")
    for column in ("setting", "value", "from", *(() if note is None else ("",))):
        settings.add_column(column, overflow="fold")
    for name, value in _settings(plan, epsilons[-1][1]):
        settings.add_row(name, value, sources.get(name, "computed"), *_noted(note))
    console.print(settings)
    table = Table()
    table.add_column("rounds", justify="right")
    table.add_column(f"epsilon at delta {plan.delta:g}", justify="right")
    table.add_column("a round's noise / largest mean", justify="right")
    if note is not None:
        table.add_column("")
    for rounds, epsilon in epsilons:
        cells = (f"{rounds:,}", _rounded_up(epsilon.value), f"{plan.noise_to_signal:.3g}")
        table.add_row(*cells, *_noted(note))
    console.print(table)
    for sentence in (advice(plan), *_warnings(plan)):
        line = sentence if note is None else f"{note[0].upper()}{note[1:]}: {sentence}"
        console.print(line, highlight=False, markup=False)


def label(plan: Plan) -> str | None:
    """What every line of a projection says; None where the population is the real one."""
    if plan.projection is None:
        return None
    return f"projection for {plan.noise_population:,} clients, not an achieved epsilon"


def _rounded_up(bound: float) -> str:
    """An upper bound that is printed stays one."""
    return f"{math.ceil(bound * 1000) / 1000:.3f}"


def _noted(note: str | None) -> tuple[str, ...]:
    return () if note is None else (note,)


def _settings(plan: Plan, last: Epsilon) -> Iterator[tuple[str, str]]:
    yield "population", f"{plan.population:,}"
    yield "cohort", f"{plan.cohort:,} expected in a round"
    yield "rounds", f"{plan.rounds:,}"
    yield "values", f"{plan.num_values:,}"
    yield "clip", f"{plan.clip_norm:g}"
    if plan.projection is not None:
        yield (
            "noise of",
            f"a cohort of {plan.noise_cohort:,.0f} of {plan.noise_population:,} clients",
        )
    if plan.max_participations is not None:
        yield "participation cap", f"{plan.max_participations:,} rounds a client"
    yield "delta", f"{plan.delta:g}"
    yield "epsilon", f"{_rounded_up(last.value)} after {plan.rounds:,} rounds"
    yield "noise multiplier", f"{plan.noise_multiplier:.4f}"
    per_value = plan.noise_multiplier * plan.clip_norm / plan.noise_cohort
    norm = per_value * math.sqrt(plan.num_values)
    yield "noise on a round's mean", f"{per_value:.3g} per value, norm {norm:.3g}"
    yield "regime", plan.regime
    yield "unit", _UNITS[plan.regime]
    yield "epsilon is", last.describe()


def _warnings(plan: Plan) -> Iterator[str]:
    if plan.delta * plan.noise_population >= 1:
        yield (
            f"Delta {plan.delta:g} is not below 1 / {plan.noise_population:,}: to tell all about "
            "one client, drawn at random, would keep this promise; choose a smaller delta."
        )
