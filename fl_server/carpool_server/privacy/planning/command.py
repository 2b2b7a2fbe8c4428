"""``carpool privacy plan``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from carpool.bundle import Bundle
from carpool.console import result_console
from carpool.errors import ConfigError
from carpool.privacy import Projection
from carpool.progress import progress


class _Preset(StrEnum):
    small = "small"
    paper = "paper"


_DEMO_WIDTH, _DEMO_DOCUMENTS = 384, 598

_PRESET_VALUES = {
    _Preset.small: 2 * _DEMO_WIDTH + 128**2 + _DEMO_DOCUMENTS,
    _Preset.paper: _DEMO_WIDTH**2 + _DEMO_WIDTH * _DEMO_DOCUMENTS,
}
"""Theta's length in the demo's bundles; another model or other documents: ``--bundle``."""

_DEFAULT_EPSILON = 8.0

_STUDY = "default: the ATT&CK study's (docs/accounting.md)"
_DEMO = "default: the demo's"
_GIVEN = "given"


def plan(
    context: typer.Context,
    *,
    population: Annotated[int, typer.Option(min=1, help="Registered clients.")] = 801,
    cohort: Annotated[int, typer.Option(min=1, help="Clients expected in a round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 60,
    values: Annotated[
        int | None, typer.Option(min=1, help="How many values are trained (theta's length).")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle to take that from.")] = None,
    preset: Annotated[
        _Preset | None,
        typer.Option(help="Take that from the demo's bundle of this preset; by default small's."),
    ] = None,
    clip: Annotated[
        float, typer.Option(help="C, the largest norm of a client's update, in theta's units.")
    ] = 0.5,
    delta: Annotated[float, typer.Option(help="Of the promise; below 1 / population.")] = 1e-5,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The budget over all rounds, from which the noise follows; by default "
            f"{_DEFAULT_EPSILON:g}."
        ),
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the noise's standard deviation over C."),
    ] = None,
    max_participations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A client is in at most so many rounds, and nothing is claimed for who is drawn "
            "(phones). By default the server samples.",
        ),
    ] = None,
    noise_cohort: Annotated[
        int | None,
        typer.Option(min=1, help="Project: use the noise of a cohort of this size."),
    ] = None,
    noise_population: Annotated[
        int | None,
        typer.Option(min=1, help="The population that this cohort would be drawn from."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A PNG to draw the plan into.")] = None,
) -> None:
    """Before training: epsilon over rounds, the noise it takes, and whether that is sensible."""
    from carpool_server.privacy.planning.output import print_plan  # noqa: PLC0415  heavy
    from carpool_server.privacy.planning.plan import make_plan  # noqa: PLC0415  same

    num_values, values_from = _num_values(values, bundle, preset)
    if not 0 < clip < float("inf"):
        raise ConfigError(f"--clip: expected a number above 0, got {clip:g}.")
    if noise_multiplier is None and epsilon is None:
        epsilon, epsilon_from = _DEFAULT_EPSILON, _STUDY
    else:
        epsilon_from = "computed" if epsilon is None else _GIVEN
    projection = _projection(noise_cohort, noise_population)
    with progress("Accounting", total=2) as bar:
        made = make_plan(
            population=population,
            cohort=cohort,
            rounds=rounds,
            num_values=num_values,
            clip_norm=clip,
            delta=delta,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            max_participations=max_participations,
            projection=projection,
        )
        bar.advance()
        epsilons = [(count, made.epsilon_after(count)) for count in made.points()]
        bar.advance()
    sources = {
        name: _GIVEN if _is_given(context, name) else _STUDY
        for name in ("population", "cohort", "rounds", "clip", "delta")
    }
    sources |= {"values": values_from, "epsilon": epsilon_from, "participation cap": _GIVEN}
    sources |= {"noise of": _GIVEN}
    if noise_multiplier is not None:
        sources["noise multiplier"] = _GIVEN
    print_plan(made, epsilons, sources=sources, console=result_console())
    if out is not None:
        from carpool_server.privacy.planning.plot import plot_plan  # noqa: PLC0415  as above

        plot_plan(made, epsilons, out)
        typer.echo(f"Wrote {out}", err=True)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _num_values(values: int | None, bundle: Path | None, preset: _Preset | None) -> tuple[int, str]:
    """Theta's length and where it is from."""
    given = [
        name
        for name, value in (("--values", values), ("--bundle", bundle), ("--preset", preset))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(
            f"expected one of --values, --bundle and --preset, got {' and '.join(given)}."
        )
    if values is not None:
        return values, _GIVEN
    if bundle is not None:
        return Bundle.open(bundle).manifest.layout.num_values, f"bundle {bundle}"
    source = f"preset {preset}" if preset else f"{_DEMO}, preset {_Preset.small}"
    return _PRESET_VALUES[preset or _Preset.small], source


def _projection(cohort: int | None, population: int | None) -> Projection | None:
    if cohort is None and population is None:
        return None
    if cohort is None or population is None:
        missing = "--noise-cohort" if cohort is None else "--noise-population"
        raise ConfigError(
            f"{missing}: expected it beside the other: a projection is for a stated cohort of a "
            "stated population."
        )
    if cohort > population:
        raise ConfigError(
            f"--noise-cohort: expected at most --noise-population {population:,}, got {cohort:,}."
        )
    return Projection(population=population, cohort=cohort)
