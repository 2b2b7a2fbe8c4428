"""An audit: canaries through the real rounds, and what can be told of them afterwards."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from carpool.config import RunConfig, SgdConfig
from carpool.errors import ConfigError
from carpool.schema import Model
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import run_rounds
from carpool_server.hooks import RoundHook
from carpool_server.in_process import LocalGrid
from carpool_server.job import Job
from carpool_server.privacy.audit.bounds import Guesses, epsilon_bound, gaussian_bound
from carpool_server.privacy.audit.canaries import BUNDLE_ID, Canaries, CanaryAggregator
from carpool_server.privacy.audit.guessing import Channel, Scores, guess, planned_guesses
from carpool_server.privacy.mechanism import bit_noise
from carpool_server.promise import noise_multiplier_of, round_mechanism
from carpool_server.statement import epsilon_label

_AGGREGATORS = 2
"""More than one, so that sums of sums are audited too."""

_DEADLINE_SECONDS = 600.0


class AuditResult(Model):
    """What an audit found.

    Attributes:
        epsilon: stated by the ledger for what was released, an upper bound.
        delta: of all epsilons here.
        method: how the ledger computed it, in words.
        confidence: of both bounds together.
        lower_bound: on epsilon, whatever the mechanism.
        gaussian_lower_bound: on epsilon, if the mechanism is a Gaussian one, as is claimed; only
            in regime ``participation-cap``, where the claim is no other.
        reach: what ``lower_bound`` would be had all guesses been right.
        canaries, guesses, correct: of the guessing.
        rounds: released.
        sampling_rate: q of each round.
        noise_multiplier: z of a release, over all that is in it.
    """

    epsilon: float
    delta: float
    method: str
    confidence: float
    lower_bound: float
    gaussian_lower_bound: float | None
    reach: float
    canaries: int
    guesses: int
    correct: int
    rounds: int
    sampling_rate: float
    noise_multiplier: float

    @property
    def largest_bound(self) -> float:
        """The larger of the bounds."""
        return max(self.lower_bound, self.gaussian_lower_bound or 0.0)

    @property
    def broken(self) -> bool:
        """Whether the stated epsilon is refuted."""
        return self.largest_bound > self.epsilon

    def rows(self) -> list[tuple[str, str]]:
        """What a table shows: names and values."""
        rows = [
            ("stated epsilon", f"{self.epsilon:.3f} at delta {self.delta:g} ({self.method})"),
            (
                f"lower bound, confidence {self.confidence:g}",
                f"{self.lower_bound:.3f} (one-run audit, whatever the mechanism; all guesses "
                f"right would be {self.reach:.2f})",
            ),
        ]
        if self.gaussian_lower_bound is not None:
            rows.append(
                (
                    "same, if Gaussian",
                    f"{self.gaussian_lower_bound:.3f} (one-run audit of the claim that it is a "
                    "Gaussian mechanism)",
                )
            )
        rows += [
            ("guessed rightly", f"{self.correct} of {self.guesses}"),
            ("canaries", f"{self.canaries}, each in or out by a fair coin"),
            (
                "rounds",
                f"{self.rounds}, sampling rate {self.sampling_rate:.4g}, noise multiplier "
                f"{self.noise_multiplier:.4g}",
            ),
        ]
        return rows

    def sentence(self) -> str:
        """What it means."""
        if self.broken:
            return (
                f"The stated epsilon of {self.epsilon:.3f} is broken: what was released shows at "
                f"least {self.largest_bound:.3f}, with confidence {self.confidence:g}."
            )
        return (
            f"The stated epsilon of {self.epsilon:.3f} is not refuted: what was released shows at "
            f"least {self.largest_bound:.3f}, with confidence {self.confidence:g}. That proves "
            "nothing; a fault that hides from this audit stays hidden."
        )


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
    adaptive = privacy.adaptive_clip
    if adaptive is not None:
        # its default depends on the cohort
        adaptive = adaptive.model_copy(update={"bit_noise": bit_noise(adaptive, expected)})
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
            "privacy": privacy.model_copy(update={"adaptive_clip": adaptive}),
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
    guessed; as many as ``planned_guesses`` says before. A run of m canaries tells about as much
    as m runs with one, and takes seconds.

    Guarantees: for a system that keeps its promise both bounds are at most the stated epsilon
    with probability ``confidence``, together: they are functions of the same number of right
    guesses. A bound that is not above it proves nothing.

    Args:
        config: of the run in question.
        canaries: 2 or more.
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
    guesses = planned_guesses(
        canaries,
        channel=channel,
        rounds=min(audited.rounds, privacy.max_participations or audited.rounds),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        confidence=confidence,
    )
    if guesses is None:
        raise ConfigError(_too_few(canaries, privacy.epsilon, privacy.delta, confidence))
    # found once: the run has no history, so what it would find is the same
    audited = audited.model_copy(
        update={"privacy": privacy.model_copy(update={"noise_multiplier": z})}
    )
    scores = Scores(canaries, channel=channel, expected_size=audited.cohort.expected_size)
    with tempfile.TemporaryDirectory(prefix="carpool-audit-") as folder:
        epsilon, rounds = _run(audited, seats, Path(folder), hooks=[scores, *hooks])
    found = guess(scores.total, seats.coins, guesses=guesses)
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
            Guesses(canaries=canaries, guesses=guesses, correct=guesses),
            delta=delta,
            confidence=confidence,
        ),
        canaries=canaries,
        guesses=guesses,
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


def _too_few(canaries: int, epsilon: float, delta: float, confidence: float) -> str:
    # all of n guesses are right with probability exp(-n exp(-epsilon)) or so
    about = math.ceil(-1.2 * math.log(1 - confidence) * math.exp(epsilon + 1))
    return (
        f"canaries: with {canaries} of them no lower bound above epsilon {epsilon:g} at delta "
        f"{delta:g} could be shown, so no fault would be. Take about {about} or more, or audit "
        "the same rounds with a smaller budget (--set privacy.epsilon=3)."
    )
