"""``carpool privacy plan``: against the accountants, the study's table and by its whole output."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from carpool.errors import ConfigError, PrivacyError
from carpool.privacy import Projection
from carpool_server.commands import register
from carpool_server.privacy.accounting import Release, epsilon_at_cap, epsilon_of
from carpool_server.privacy.planning import Plan, advice, make_plan
from carpool_server.privacy.planning.evidence import (
    BANDS,
    MEASURED,
    SENSIBLE,
    band_of,
    noise_to_signal,
)

PLAN = Plan(
    population=801,
    cohort=50,
    rounds=60,
    num_values=17_750,
    clip_norm=0.5,
    delta=1e-5,
    noise_multiplier=0.8,
)


def run_plan(*arguments: object) -> str:
    """Runs the command; a CarpoolError comes through as itself."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["privacy", "plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plan_costs_what_its_releases_cost() -> None:
    """Every value of theta gets noise, in every round, from a cohort of the population."""
    release = Release(
        noise_multiplier=0.8, sampling_rate=50 / 801, num_values=17_750, scale=858993459
    )
    assert PLAN.epsilon_after(12) == epsilon_of([release] * 12, delta=1e-5)
    capped = dataclasses.replace(PLAN, max_participations=4)
    assert capped.epsilon_after(12) == epsilon_at_cap(
        [release] * 12, delta=1e-5, max_participations=4
    )


def test_a_projection_costs_what_the_imagined_population_would_pay() -> None:
    """Its noise is divided by the imagined cohort too."""
    projected = dataclasses.replace(PLAN, projection=Projection(population=16_000, cohort=1000))
    real = dataclasses.replace(PLAN, population=16_000, cohort=1000)
    assert projected.epsilon_after(60) == real.epsilon_after(60)
    assert projected.noise_to_signal == real.noise_to_signal == PLAN.noise_to_signal / 20


def test_a_plan_for_a_budget_keeps_it() -> None:
    """And just so, with and without a cap."""
    for cap in (None, 5):
        plan = make_plan(
            population=801,
            cohort=50,
            rounds=60,
            num_values=17_750,
            clip_norm=0.5,
            delta=1e-5,
            epsilon=4.0,
            noise_multiplier=None,
            max_participations=cap,
        )
        assert 3.99 <= plan.epsilon_after(60).value <= 4


def test_noise_to_signal_is_the_ratio_of_norms() -> None:
    """Noise of z * C per value, divided by the cohort, against a mean as long as C."""
    z, clip, values, cohort = 0.7, 0.5, 10_000, 50
    noise_norm = math.sqrt(values * (z * clip / cohort) ** 2)
    ratio = noise_to_signal(noise_multiplier=z, num_values=values, cohort=cohort)
    assert ratio == pytest.approx(noise_norm / clip)


def test_every_band_is_what_was_measured_in_it() -> None:
    """Its end is the last measured ratio rounded up, its shares enclose the measured ones."""
    for band in BANDS:
        cells = [cell for cell in MEASURED if band_of(cell.noise_to_signal) is band]
        kept = [cell.kept for cell in cells]
        assert cells
        assert min(kept) - 0.01 < band.kept_least <= min(kept)
        assert max(kept) <= band.kept_most < max(kept) + 0.01
        if math.isfinite(band.up_to):
            last = max(cell.noise_to_signal for cell in cells)
            assert last <= band.up_to < 1.02 * last


CHANGED = {
    "cohort": re.compile(r"a cohort of ([\d,]+) from a population of ([\d,]+)"),
    "values": re.compile(r"at most ([\d,]+) values"),
    "rounds": re.compile(r"at most ([\d,]+) rounds"),
    "epsilon": re.compile(r"epsilon ([\d.]+)[. ]"),
}


def test_what_the_advice_names_makes_the_plan_sensible() -> None:
    """Each change alone: one step less would not do, and the epsilon stays (or is the named)."""
    plan = dataclasses.replace(
        PLAN, population=160_000, cohort=1600, noise_multiplier=1.0, num_values=1_500_000
    )
    text, budget = advice(plan), plan.epsilon_after(60).value
    assert text.startswith("This plan is costly: ")
    found = {name: pattern.search(text) for name, pattern in CHANGED.items()}
    numbers = {
        name: [float(group.replace(",", "")) for group in match.groups()]
        for name, match in found.items()
        if match is not None
    }
    assert set(numbers) == set(CHANGED)
    cohort, population = map(int, numbers["cohort"])
    larger = dataclasses.replace(plan, cohort=cohort, population=population)
    assert larger.noise_to_signal <= SENSIBLE.up_to
    assert dataclasses.replace(larger, cohort=cohort - 1).noise_to_signal > SENSIBLE.up_to
    assert larger.epsilon_after(60).value <= budget + 1e-3
    (values,) = map(int, numbers["values"])
    assert dataclasses.replace(plan, num_values=values).noise_to_signal <= SENSIBLE.up_to
    assert dataclasses.replace(plan, num_values=values + 1).noise_to_signal > SENSIBLE.up_to
    z = plan.noise_multiplier * SENSIBLE.up_to / plan.noise_to_signal
    quiet = dataclasses.replace(plan, noise_multiplier=z)
    (rounds,) = map(int, numbers["rounds"])
    assert quiet.epsilon_after(rounds).value <= budget < quiet.epsilon_after(rounds + 1).value
    assert quiet.epsilon_after(60).value == pytest.approx(numbers["epsilon"][0], abs=0.005)


def test_the_advice_says_what_cannot_help() -> None:
    """At the real 801 clients neither fewer rounds nor a larger epsilon would do."""
    text = advice(dataclasses.replace(PLAN, noise_multiplier=1.353))
    assert text.endswith("values (fewer rounds or a larger epsilon alone cannot do it).")


def test_a_sensible_plan_is_called_that() -> None:
    """With what it rests on."""
    plan = dataclasses.replace(PLAN, population=16_000, cohort=1000, noise_multiplier=1.353)
    assert advice(plan) == (
        "This plan is sensible: a round's noise is 0.18 times the largest mean, where the "
        "ATT&CK study kept at least 93% of the gain over zero-shot."
    )


def test_an_epsilon_that_promises_little_is_no_sensible_plan() -> None:
    """Little noise is not all that a plan is for."""
    plan = dataclasses.replace(PLAN, noise_multiplier=0.5)
    assert advice(plan) == (
        f"This plan is not sensible: epsilon {plan.epsilon_after(60).value:.3g} is above 10, "
        "beyond which the promise is weak; plan for a smaller one."
    )


def test_the_command_prints_noise_epsilon_and_where_its_defaults_are_from() -> None:
    """The known noise multiplier for epsilon 8 with 50 of 801 clients over 60 rounds."""
    text = run_plan("--rounds", 60)
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 3
    }
    z = float(rows["noise multiplier"][0])
    assert z == pytest.approx(0.693, abs=2e-3)
    assert rows["rounds"] == ["60", "given"]
    assert rows["population"][1] == "default: the ATT&CK study's (docs/accounting.md)"
    assert rows["values"] == ["17,750", "default: the demo's, preset small"]
    assert rows["regime"][0] == "poisson"
    assert "add or remove" in text
    epsilons = [float(rows[str(count)][0]) for count in (1, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60)]
    assert epsilons == sorted(epsilons)
    assert 7.99 <= epsilons[-1] <= 8
    assert float(rows["60"][1]) == pytest.approx(z * math.sqrt(17_750) / 50, rel=0.01)


def test_every_line_of_a_projection_says_that_it_is_one(tmp_path: Path) -> None:
    """In each row of both tables and before each sentence; the picture is a PNG."""
    out = tmp_path / "plan.png"
    text = run_plan(
        *("--noise-multiplier", 1.353, "--noise-cohort", 1000, "--noise-population", 16_000),
        *("--out", out),
    )
    note = "projection for 16,000 clients"
    # a row begins where its first cell is filled; wrapped cells continue it
    rows = [line for line in text.splitlines() if re.match(r"│ *[^│ ]", line)]
    assert len(rows) > 20
    assert [row for row in rows if note not in row] == []
    assert text.count("not an achieved epsilon") > len(rows)
    assert "Projection for 16,000 clients, not an achieved epsilon: This plan is" in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_values_are_a_bundles_where_one_is_given(small_bundle: Path) -> None:
    """The demo's: just what the preset of its name stands for."""
    from carpool.bundle import Bundle  # noqa: PLC0415  only here

    values = Bundle.open(small_bundle).manifest.layout.num_values
    text = run_plan("--bundle", small_bundle, "--max-participations", 5)
    assert re.search(rf"│ values +│ {values:,} +│ bundle ", text)
    text = run_plan("--preset", "small", "--max-participations", 5)
    assert re.search(rf"│ values +│ {values:,} +│ preset small ", text)
    assert "participation-cap" in text


def test_a_delta_that_one_client_in_full_would_keep_is_pointed_out() -> None:
    """Delta 1/100 for 801 clients."""
    text = " ".join(run_plan("--delta", 0.01, "--noise-multiplier", 2).split())
    assert (
        "Delta 0.01 is not below 1 / 801: to tell all about one client, drawn at random, would "
        "keep this promise; choose a smaller delta."
    ) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--cohort", 900),
            "--cohort: expected at most the population of 801, got 900.",
        ),
        (
            ("--epsilon", 2, "--noise-multiplier", 1),
            (
                "expected one of --epsilon and --noise-multiplier, got both: the one follows "
                "from the other."
            ),
        ),
        (
            ("--values", 10, "--preset", "paper"),
            "expected one of --values, --bundle and --preset, got --values and --preset.",
        ),
        (
            ("--max-participations", 3),
            (
                "--max-participations: expected at least 4, so that 801 clients can fill 60 rounds "
                "of 50, got 3. Raise it or the population, or plan fewer rounds or a smaller "
                "cohort."
            ),
        ),
        (
            ("--noise-cohort", 1000),
            (
                "--noise-population: expected it beside the other: a projection is for a stated "
                "cohort of a stated population."
            ),
        ),
        (
            ("--noise-cohort", 1000, "--noise-population", 900),
            "--noise-cohort: expected at most --noise-population 900, got 1,000.",
        ),
        (
            ("--noise-cohort", 5, "--noise-population", 9, "--max-participations", 9),
            (
                "--noise-cohort: expected no --max-participations beside it, since a projection is "
                "of a population that the server samples. Leave one of them out."
            ),
        ),
        (("--clip", 0), "--clip: expected a number above 0, got 0."),
    ],
)
def test_a_combination_that_is_no_plan_is_refused(
    arguments: tuple[object, ...], message: str
) -> None:
    """By the options' names, with what to do."""
    with pytest.raises(ConfigError) as caught:
        run_plan(*arguments)
    assert str(caught.value) == message


def test_a_plan_without_noise_is_refused() -> None:
    """It has no epsilon."""
    with pytest.raises(PrivacyError, match=r"^noise multiplier: expected a number above 0, got 0"):
        run_plan("--noise-multiplier", 0)
