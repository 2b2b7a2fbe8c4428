"""A plan: who, how often, how much noise, and what that costs."""

from __future__ import annotations

import dataclasses
import math

from carpool.errors import ConfigError
from carpool.gaussian import LARGEST_SCALE
from carpool.privacy import Projection, Regime
from carpool.protocol import GRID_BITS
from carpool_server.privacy.accounting import (
    Epsilon,
    Release,
    calibrate,
    epsilon_at_cap,
    epsilon_of,
)
from carpool_server.privacy.planning.evidence import noise_to_signal

_POINTS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rounds that are not yet run. Nothing here is achieved by making it.

    Attributes:
        population: registered clients.
        cohort: clients expected in a round.
        rounds: how many.
        num_values: of theta, every one of which gets noise.
        clip_norm: C, in theta's units.
        delta: of all epsilons.
        noise_multiplier: z.
        max_participations: the cap; None where the server samples.
        projection: the imagined population and cohort whose noise it is; None for the real ones.
    """

    population: int
    cohort: int
    rounds: int
    num_values: int
    clip_norm: float
    delta: float
    noise_multiplier: float
    max_participations: int | None = None
    projection: Projection | None = None

    @property
    def regime(self) -> Regime:
        """What may be claimed about who is in a round."""
        return "poisson" if self.max_participations is None else "participation-cap"

    @property
    def noise_cohort(self) -> float:
        """The cohort whose noise is added, and which it is divided by."""
        return self.cohort if self.projection is None else self.projection.cohort

    @property
    def noise_population(self) -> int:
        """The population that the epsilons are of."""
        return self.population if self.projection is None else self.projection.population

    @property
    def noise_to_signal(self) -> float:
        """Of one round: the noise's norm on the mean over the largest norm of the mean."""
        return noise_to_signal(
            noise_multiplier=self.noise_multiplier,
            num_values=self.num_values,
            cohort=self.noise_cohort,
        )

    def epsilon_after(self, rounds: int) -> Epsilon:
        """What so many rounds cost.

        Guarantees: as ``accounting.epsilon_of``, with a cap as ``accounting.epsilon_at_cap``;
        for a projection of nobody real.

        Raises:
            PrivacyError: no epsilon can be stated.
        """
        scale = min(LARGEST_SCALE, round(math.ldexp(self.noise_multiplier, GRID_BITS)))
        release = Release(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.noise_cohort / self.noise_population,
            num_values=self.num_values,
            scale=scale,
        )
        releases = [release] * rounds
        if self.max_participations is None:
            return epsilon_of(releases, delta=self.delta)
        return epsilon_at_cap(
            releases, delta=self.delta, max_participations=self.max_participations
        )

    def points(self) -> list[int]:
        """The first round and every tenth part of the way: where epsilon is shown."""
        tenths = {max(1, round(self.rounds * part / _POINTS)) for part in range(1, _POINTS + 1)}
        return sorted({1, *tenths})


def make_plan(
    *,
    population: int,
    cohort: int,
    rounds: int,
    num_values: int,
    clip_norm: float,
    delta: float,
    epsilon: float | None,
    noise_multiplier: float | None,
    max_participations: int | None = None,
    projection: Projection | None = None,
) -> Plan:
    """A plan with its noise: the one given, or the least that keeps ``epsilon``.

    Guarantees: with ``epsilon``, ``plan.epsilon_after(rounds)`` is at most that.

    Args:
        population: registered clients.
        cohort: expected in a round.
        rounds: how many.
        num_values: of theta.
        clip_norm: C.
        delta: in (0, 1).
        epsilon: the budget over all rounds; None with a noise multiplier.
        noise_multiplier: z; None with a budget.
        max_participations: the cap, for the regime without sampling.
        projection: an imagined population and cohort, whose noise is planned instead.

    Raises:
        ConfigError: a combination that is no plan; names the option.
        PrivacyError: no noise keeps the budget, or no epsilon can be stated.
    """
    if cohort > population:
        raise ConfigError(
            f"--cohort: expected at most the population of {population:,}, got {cohort:,}."
        )
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError(
            "expected one of --epsilon and --noise-multiplier, got "
            f"{'neither' if epsilon is None else 'both'}: the one follows from the other."
        )
    if max_participations is not None:
        if projection is not None:
            raise ConfigError(
                "--noise-cohort: expected no --max-participations beside it, since a projection "
                "is of a population that the server samples. Leave one of them out."
            )
        least = math.ceil(cohort * rounds / population)
        if max_participations < least:
            raise ConfigError(
                f"--max-participations: expected at least {least}, so that {population:,} "
                f"clients can fill {rounds:,} rounds of {cohort:,}, got {max_participations}. "
                "Raise it or the population, or plan fewer rounds or a smaller cohort."
            )
    plan = Plan(
        population=population,
        cohort=cohort,
        rounds=rounds,
        num_values=num_values,
        clip_norm=clip_norm,
        delta=delta,
        noise_multiplier=1.0 if noise_multiplier is None else noise_multiplier,
        max_participations=max_participations,
        projection=projection,
    )
    if epsilon is None:
        return plan
    z = calibrate(
        epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        sampling_rate=plan.noise_cohort / plan.noise_population,
        max_participations=max_participations,
        num_values=num_values,
    )
    return dataclasses.replace(plan, noise_multiplier=z)
