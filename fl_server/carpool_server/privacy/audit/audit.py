"""An audit: canaries through the real rounds, and what can be told of them afterwards."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from carpool.config import RunConfig, SgdConfig
from carpool.errors import ConfigError
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import run_rounds
from carpool_server.hooks import RoundHook
from carpool_server.in_process import LocalGrid
from carpool_server.job import Job
from carpool_server.privacy.audit.bounds import epsilon_bound, gaussian_bound
from carpool_server.privacy.audit.canaries import BUNDLE_ID, Canaries, CanaryAggregator
from carpool_server.privacy.audit.guessing import Channel, Scores, make_plan
from carpool_server.privacy.audit.result import AuditResult
from carpool_server.privacy.mechanism import bit_noise
from carpool_server.promise import noise_multiplier_of, round_mechanism
from carpool_server.statement import epsilon_label

_AGGREGATORS = 2
"""More than one, so that sums of sums are audited too."""

_DEADLINE_SECONDS = 600.0

_MORE_CANARIES = [1000 * 2**n for n in range(1, 6)]
"""What is tried to say how many are enough."""


def audit_config(config: RunConfig, *, canaries: int, population: int | None) -> RunConfig:
    """A run's settings with canaries in the place of its devices.

    What the guarantee depends on stays: clip, noise multiplier or budget, delta, regime, cap,
    rounds, sampling rate, adaptive clip with its noise, metrics with their share. What it does
    not depend on goes: the server's optimiser (plain addition shows more than any other),
    recipe, deadlines.

    Args:
        config: the run's, of mode ``central``.
        canaries: how many.
        population: the run's registered devices, for its sampling rate; None, in regime
            ``participation-cap`` alone, has every canary in every round up to its cap, which
            is the worst that the promise covers.

    Raises:
        ConfigError: another mode, or a population that is missing or too small.
    """
    privacy = config.privacy
    if privacy.mode != "central":
        raise ConfigError(
            f"privacy.mode: expected 'central', which promises an epsilon of what is released, "
            f"got {privacy.mode!r}. Choose other settings, or set privacy.mode."
        )
    if population is None and privacy.regime == "poisson":
        raise ConfigError(
            "population: expected the number of registered devices, which regime 'poisson' has "
            "its sampling rate from. Give it with --population."
        )
    expected = config.cohort.expected_size
    if population is not None and expected > population:
        raise ConfigError(
            f"population: expected at least the cohort of {expected:g} devices, got {population}."
        )
    rate = 1.0 if population is None else expected / population
    if privacy.adaptive_clip is not None:
        # its default depends on the run's cohort and noise, so both are settled here
        z = noise_multiplier_of(
            config,
            population=population or math.ceil(expected),
            num_values=canaries,
            history=(),
        )
        noise = bit_noise(privacy.adaptive_clip, expected, noise_multiplier=z)
        adaptive = privacy.adaptive_clip.model_copy(update={"bit_noise": noise})
        privacy = privacy.model_copy(update={"adaptive_clip": adaptive, "noise_multiplier": z})
    cohort = config.cohort.model_copy(
        update={
            "expected_size": rate * canaries,
            "quorum": 1.0,
            "deadline_seconds": _DEADLINE_SECONDS,
            "extensions": 0,
        }
    )
    return config.model_copy(
        update={
            "privacy": privacy,
            "cohort": cohort,
            "server": SgdConfig(learning_rate=1.0),
        }
    )


def run_audit(
    config: RunConfig,
    *,
    canaries: int = 2000,
    population: int | None = None,
    confidence: float = 0.95,
    hooks: Sequence[RoundHook] = (),
) -> AuditResult:
    """Runs canaries through the coordinator's rounds and guesses which of them were in.

    What is audited: ``run_rounds`` with its messages, checks, exact sums, noise, ledger, caps,
    checkpoints and releases, as they are, over Flower's ``Grid`` in this process; and the
    aggregators' clipping and adding. What is not: devices and their programs, other transports,
    the secrecy of anything but the thetas. The adversary sees every released theta, knows all
    of the settings, and chose every update.

    How: one run, in which each of the canaries (one of theta's values each, ten times as long
    as the clip) is in by a fair coin, or out: what it adds is zero, its participation stays,
    which is the neighbouring relation of regime ``participation-cap``, and adds up to the same
    as removing it in regime ``poisson``. The canaries with the highest and lowest scores are
    guessed; as many as ``make_plan`` says before. A run of m canaries tells about as much
    as m runs with one, and takes seconds.

    Guarantees: for a system that keeps its promise both bounds are at most the stated epsilon
    with probability ``confidence``, together: they are functions of the same number of right
    guesses. A bound that is not above it proves nothing.

    Args:
        config: of the run in question.
        canaries: a few hundred or more.
        population: as for ``audit_config``.
        confidence: in (0, 1).
        hooks: called after each release, as a run's are.

    Raises:
        ConfigError: settings that promise nothing or cannot be run; too few canaries to show
            anything above the stated epsilon.
        PrivacyError: the budget cannot be met.
        RoundFailed: the coordinator refused the canaries' sums.
    """
    audited = audit_config(config, canaries=canaries, population=population)
    privacy = audited.privacy
    if privacy.epsilon is None or privacy.delta is None:
        raise ValueError("Expected a validated PrivacyConfig.")
    rate = audited.cohort.expected_size / canaries
    seats = Canaries(canaries)
    z = noise_multiplier_of(
        audited,
        population=canaries,
        num_values=round_mechanism(audited, num_values=canaries, noise_multiplier=0.0).num_values,
        history=[],
    )
    mechanism = round_mechanism(audited, num_values=canaries, noise_multiplier=z)
    channel = Channel(noise_multiplier=mechanism.multiplier("theta"), rate=rate)
    planned = functools.partial(
        make_plan,
        channel=channel,
        rounds=_rounds(audited, rate=rate),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        confidence=confidence,
    )
    plan = planned(canaries)
    if plan is None:
        enough = next((n for n in _MORE_CANARIES if n > canaries and planned(n)), None)
        advice = f"Take {enough}" if enough else f"Nor would {_MORE_CANARIES[-1]} be enough"
        raise ConfigError(
            f"canaries: with {canaries} of them a system without noise could not be told from "
            f"one that keeps epsilon {privacy.epsilon:g} at delta {privacy.delta:g}. {advice}; or "
            "audit the same rounds with a smaller budget (--set privacy.epsilon=3)."
        )
    # found once: the run has no history, so what it would find is the same
    audited = audited.model_copy(
        update={"privacy": privacy.model_copy(update={"noise_multiplier": z})}
    )
    scores = Scores(canaries, channel=channel, expected_size=audited.cohort.expected_size)
    with tempfile.TemporaryDirectory(prefix="carpool-audit-") as folder:
        epsilon, rounds = _run(audited, seats, Path(folder), hooks=[scores, *hooks])
    found = plan.guess(scores.total, seats.coins)
    capped = privacy.regime == "participation-cap"
    delta = privacy.delta
    return AuditResult(
        epsilon=epsilon,
        delta=delta,
        method=epsilon_label(privacy),
        confidence=confidence,
        lower_bound=epsilon_bound(found, delta=delta, confidence=confidence),
        gaussian_lower_bound=(
            gaussian_bound(found, delta=delta, confidence=confidence) if capped else None
        ),
        reach=epsilon_bound(
            dataclasses.replace(found, correct=found.guesses), delta=delta, confidence=confidence
        ),
        canaries=canaries,
        guesses=found.guesses,
        guesses_out=plan.low,
        correct=found.correct,
        rounds=rounds,
        sampling_rate=rate,
        noise_multiplier=z,
    )


def _run(
    config: RunConfig, canaries: Canaries, folder: Path, *, hooks: Sequence[RoundHook]
) -> tuple[float, int]:
    """The run's stated epsilon, and its rounds."""
    nodes = {
        1 + part: CanaryAggregator(canaries, canaries.device_ids[part::_AGGREGATORS])
        for part in range(_AGGREGATORS)
    }
    opened = RunFolder(folder, config=config, bundle_id=BUNDLE_ID, data_id=None, resume=False)
    with closing(opened):
        job = Job(
            config=config,
            bundle_id=BUNDLE_ID,
            layout=canaries.layout,
            initial_theta=np.zeros(canaries.layout.num_values, dtype=np.float32),
            hooks=hooks,
            aggregators=len(nodes),
        )
        result = run_rounds(LocalGrid(dict(nodes)), job, opened)
    if result.epsilon is None:
        raise ValueError("Expected a run of mode 'central'.")
    return result.epsilon, result.info.round_number


def _rounds(config: RunConfig, *, rate: float) -> int:
    """About as many as a canary is there for."""
    cap = config.privacy.max_participations
    return config.rounds if cap is None else min(config.rounds, math.ceil(cap / rate))
