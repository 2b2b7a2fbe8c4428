"""An audit through the real rounds: below the stated epsilon, and above it for planted faults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from flwr.app import Message
from round_kit import settings
from typer.testing import CliRunner

from carpool.errors import ConfigError, RoundFailed
from carpool.protocol import GRID_BOUND
from carpool_server.aggregation import contribution
from carpool_server.privacy import mechanism
from carpool_server.privacy.audit import (
    AuditResult,
    Guesses,
    audit_config,
    epsilon_bound,
    gaussian_bound,
    run_audit,
)
from carpool_server.privacy.audit import audit as audit_module
from carpool_server.privacy.audit.guessing import Channel, Plan, make_plan
from carpool_sim.audit import audit

CONFIDENCE = 0.99


def capped(epsilon: float, *, cap: int, rounds: int, **more: object) -> dict[str, Any]:
    privacy = {"regime": "participation-cap", "max_participations": cap, "epsilon": epsilon}
    return {"rounds": rounds, "privacy": {"delta": 1e-5, **privacy, **more}}


# what calibration finds for these takes seconds, so it is given
POISSON = {
    "rounds": 3,
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "noise_multiplier": 1.75},
}
SETTINGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "one release": (capped(3.0, cap=1, rounds=1), None),
    "three of four rounds": (capped(2.5, cap=3, rounds=4), None),
    "sampled rounds": (POISSON, 24),
}


def audited(name: str, *, canaries: int = 1000, confidence: float = CONFIDENCE) -> AuditResult:
    changes, population = SETTINGS[name]
    return run_audit(
        settings(mode="central", **changes),
        canaries=canaries,
        population=population,
        confidence=confidence,
    )


def chance_of_false_alarm(result: AuditResult) -> float:
    """That a correct system's guesses put the bound above its epsilon.

    Given what was released, each guess of a correct system is right independently of the
    others; so many right ones are at most as likely as with all of them of their mean
    accuracy (Hoeffding, 1956). That accuracy is simulated, and enlarged by
    0.04, which is seven standard errors.
    """
    channel = Channel(noise_multiplier=result.noise_multiplier, rate=result.sampling_rate)
    plan = Plan(high=result.guesses - result.guesses_out, low=result.guesses_out)
    generator, right = np.random.default_rng(3), []
    for _ in range(40):
        coins = generator.integers(0, 2, size=result.canaries).astype(np.bool_)
        scores = np.zeros(result.canaries)
        for _ in range(result.rounds):
            drawn = coins & (generator.random(coins.size) < channel.rate)
            seen = drawn + channel.noise_multiplier * generator.standard_normal(coins.size)
            scores += channel.scores(seen)
        right.append(plan.guess(scores, coins).correct)
    accuracy, r = float(np.mean(right)) / result.guesses + 0.04, result.guesses
    low, high = 0, r
    while low < high:  # the least number of right guesses that raises the alarm
        middle = (low + high) // 2
        found = Guesses(canaries=result.canaries, guesses=r, correct=middle)
        above = epsilon_bound(found, delta=result.delta, confidence=result.confidence)
        low, high = (low, middle) if above > result.epsilon else (middle + 1, high)
    return math.fsum(
        math.comb(r, k) * accuracy**k * (1 - accuracy) ** (r - k) for k in range(low, r + 1)
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_correct_system_stays_below_its_epsilon(name: str) -> None:
    """Whatever the mechanism, and as the Gaussian that is claimed; and something is seen."""
    result = audited(name)
    assert result.canaries == 1000
    assert result.epsilon <= 3
    assert chance_of_false_alarm(result) < 1e-9
    assert result.lower_bound < result.epsilon < result.reach
    found = Guesses(canaries=1000, guesses=result.guesses, correct=result.correct)
    if result.gaussian_lower_bound is None:
        assert name == "sampled rounds"
    else:  # at the confidence of the test's own false alarms
        assert gaussian_bound(found, delta=result.delta, confidence=1 - 1e-9) < result.epsilon
    # right guesses as by chance would be six standard deviations off for "one release"
    assert name != "one release" or result.lower_bound > 0


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mechanism, "gaussian_on_grid", lambda count, *, scale: np.zeros(count, np.int64) * scale
    )


def tenth_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mechanism.gaussian_on_grid
    monkeypatch.setattr(
        mechanism, "gaussian_on_grid", lambda count, *, scale: real(count, scale=scale // 10)
    )


def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(total: np.ndarray, update: np.ndarray, *, clip_norm: float, device_id: str) -> float:
        assert device_id
        total += np.rint(update.astype(np.float64) / clip_norm * GRID_BOUND).astype(np.int64)
        return float(np.linalg.norm(update))

    monkeypatch.setattr(contribution, "clip_onto", add)


@pytest.mark.parametrize("fault", [no_noise, tenth_of_the_noise, no_clip])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_planted_fault_is_seen(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """The bound that asks nothing of the mechanism is above what the ledger states."""
    fault(monkeypatch)
    result = audited(name)
    assert result.canaries == 1000
    assert result.epsilon <= 3
    assert result.lower_bound > result.epsilon
    assert result.broken
    assert result.sentence().startswith(f"The stated epsilon of {result.epsilon:.3f} is broken: ")


def test_adaptive_clip_and_metrics_are_part_of_what_is_audited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their blocks are noised too; without that noise theta's still hides the canaries."""
    changes = capped(3.0, cap=2, rounds=2, adaptive_clip={"bit_noise": 3.0}, metrics={})
    config = settings(mode="central", **changes)
    blocks: list[int] = []
    real = mechanism.gaussian_on_grid

    def counted(count: int, *, scale: int) -> np.ndarray:
        blocks.append(count)
        return real(count, scale=scale)

    monkeypatch.setattr(mechanism, "gaussian_on_grid", counted)
    result = run_audit(config, canaries=1000, confidence=CONFIDENCE)
    assert blocks == [1000, 1, 4] * 2
    assert result.rounds == 2
    assert result.lower_bound < result.epsilon
    no_noise(monkeypatch)
    assert run_audit(config, canaries=1000, confidence=CONFIDENCE).broken


def test_what_the_guarantee_depends_on_is_the_runs_own() -> None:
    """The sampling rate is kept, not the cohort; the bit's noise is that of the run's cohort."""
    privacy = {"adaptive_clip": {}, "metrics": {}, "noise_multiplier": 1.1}
    config = settings(mode="central", privacy=privacy)
    mine = audit_config(config, canaries=1000, population=48)
    assert mine.cohort.expected_size == 250
    assert mine.privacy.adaptive_clip is not None
    # a cohort of 12, whose bits may cost a tenth of the budget; 250 would have 12.5 of noise
    assert mine.privacy.adaptive_clip.bit_noise == pytest.approx(1.1 * math.sqrt(10) / 2)
    assert mine.privacy.model_copy(update={"adaptive_clip": None}) == (
        config.privacy.model_copy(update={"adaptive_clip": None})
    )
    assert mine.rounds == config.rounds


def test_what_cannot_be_audited_is_refused() -> None:
    """No promise, no sampling rate, and an audit that could find nothing."""
    with pytest.raises(ConfigError, match=r"^privacy\.mode: expected 'central', .* got 'none'\."):
        run_audit(settings())
    poisson = settings(mode="central")
    with pytest.raises(ConfigError, match=r"^population: expected the number of registered"):
        run_audit(poisson)
    with pytest.raises(ConfigError, match=r"^population: expected at least the cohort of 12 "):
        run_audit(poisson, population=11)
    with pytest.raises(ConfigError, match=r"^canaries: with 100 of them .*\. Take 2000; or"):
        run_audit(settings(mode="central", **SETTINGS["one release"][0]), canaries=100)
    large = settings(mode="central", **capped(9.0, cap=1, rounds=1))
    with pytest.raises(ConfigError, match=r"epsilon 9 at delta 1e-05\. Nor would 32000 be enough"):
        run_audit(large, canaries=100)


def test_the_number_of_guesses_is_a_function_of_the_settings() -> None:
    """Chosen before the run: a choice by the result would not be one test any more."""
    arguments: dict[str, Any] = {
        "channel": Channel(noise_multiplier=1.4, rate=1.0),
        "rounds": 1,
        "epsilon": 3.0,
        "delta": 1e-5,
        "confidence": 0.95,
    }
    first = make_plan(1000, **arguments)
    assert first == make_plan(1000, **arguments)
    assert first is not None
    assert 100 <= first.guesses < 1000
    assert first.low == first.guesses // 2
    # never drawn looks like out: with few draws "out" is no good guess
    arguments |= {"channel": Channel(noise_multiplier=1.4, rate=0.2), "rounds": 3}
    sampled = make_plan(4000, **arguments)
    assert sampled is not None
    assert sampled.low == 0


def test_an_aggregator_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is an error, at once, and no deadline is waited for."""

    def fail(_self: object, _message: Message) -> Message:
        raise ArithmeticError("no sum today")

    monkeypatch.setattr(audit_module.CanaryAggregator, "__call__", fail)
    with pytest.raises(RoundFailed, match=r"no sum today"):
        audited("one release")


SETTINGS_FILE = """
rounds = 2
seed = 1
privacy = {mode = "central", regime = "participation-cap", max_participations = 1,
           clip_norm = 0.5, epsilon = 3.0, delta = 1e-9}
cohort = {expected_size = 10}
local = {learning_rate = 0.1, epochs = 1, batch_size = 8}
server = {kind = "adam", learning_rate = 0.01}
"""


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_both_bounds_and_fails_where_one_is_broken(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """Exit code 1 for a broken promise; --json holds the result.

    At this confidence even the Gaussian bound's alarm would take 516 right guesses of 566,
    where a correct system has about 370: less than 1e-9.
    """
    if broken:
        no_noise(monkeypatch)
    settings_path, out = tmp_path / "settings.toml", tmp_path / "audit.json"
    settings_path.write_text(SETTINGS_FILE.replace("\n           ", " "))
    app = typer.Typer()
    app.command()(audit)
    arguments = ["--settings", str(settings_path), "--canaries", "1000", "--confidence", "0.9999"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(out)])
    result = AuditResult.model_validate(json.loads(out.read_text()))
    assert done.exit_code == int(broken), done.output
    assert result.sentence() in done.output
    assert f"{result.lower_bound:.3f} (one-run audit" in done.output
    assert f"{result.correct} of {result.guesses}" in done.output
    assert result.rounds == 1
