"""A run's side of its promise: what it promises, how much noise that takes, what a round costs."""

from __future__ import annotations

from collections.abc import Sequence

from carpool.config import RunConfig
from carpool.privacy import MetricBounds, PrivacyConfig
from carpool.protocol import block_sizes
from carpool.recipe import ExamplePrivacy, LocalRecipe
from carpool_server.privacy.accounting import Release, calibrate
from carpool_server.privacy.clipping import grid_step
from carpool_server.privacy.ledger import Charge, Promise
from carpool_server.privacy.mechanism import Mechanism, mechanism_for
from carpool_server.sampling import sampling_rate

UNIT = "one device, all of its text, over all rounds of all runs of the population"
"""Of mode ``central``, where nobody says which devices are one person's."""


def promise_of(privacy: PrivacyConfig, *, population: str) -> Promise | None:
    """What a ledger must hold for these settings; None where it holds nothing."""
    if privacy.mode != "central" or privacy.regime is None:
        return None
    if privacy.epsilon is None or privacy.delta is None:
        raise ValueError("Expected a validated PrivacyConfig.")
    return Promise(
        population=population,
        unit=UNIT,
        regime=privacy.regime,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        max_participations=privacy.max_participations,
    )


def noise_multiplier_of(
    config: RunConfig, *, population: int, num_values: int, history: Sequence[Release]
) -> float:
    """The noise multiplier of each of the run's releases; 0 where none is added centrally.

    Guarantees: in mode ``central``, unless the settings name it, it is the least (to the
    accounting's tolerance) with which all rounds and ``history`` keep the budget.

    Args:
        config: the settings.
        population: registered devices.
        num_values: noised integers in a release.
        history: what the population's ledger holds already.

    Raises:
        PrivacyError: history or the accountant's resolution leave no room.
    """
    privacy = config.privacy
    if privacy.epsilon is None or privacy.delta is None or privacy.mode == "example_level":
        return 0.0
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    return calibrate(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        rounds=config.rounds,
        sampling_rate=claimed_rate(config, population=population),
        max_participations=privacy.max_participations,
        num_values=num_values,
        history=history,
    )


def claimed_rate(config: RunConfig, *, population: int) -> float:
    """Q that the accounting may use: 1 where nothing is claimed for the draw.

    Raises:
        ConfigError: more devices expected in a round than there are.
    """
    privacy, expected = config.privacy, config.cohort.expected_size
    if privacy.projection is not None:
        return privacy.projection.cohort / privacy.projection.population
    rate = sampling_rate(expected_size=expected, population=population)
    return 1.0 if privacy.regime == "participation-cap" else rate


def charge_of(
    config: RunConfig,
    *,
    run_id: str,
    round_number: int,
    clip_norm: float,
    mechanism: Mechanism,
    population: int,
) -> Charge:
    """A round's price."""
    return Charge(
        run_id=run_id,
        round_number=round_number,
        noise_multiplier=mechanism.noise_multiplier,
        sampling_rate=claimed_rate(config, population=population),
        clip_norm=clip_norm,
        sigma=mechanism.scales["theta"] * grid_step(clip_norm),
        num_values=mechanism.num_values,
        scale=min(mechanism.scales.values()),
        expected_size=config.cohort.expected_size,
    )


def metric_bounds(privacy: PrivacyConfig) -> MetricBounds | None:
    """What devices' metrics are clipped to; None where they add none."""
    if privacy.metrics is None:
        return None
    return MetricBounds.model_validate(
        {name: getattr(privacy.metrics, name) for name in MetricBounds.model_fields}
    )


def round_mechanism(config: RunConfig, *, num_values: int, noise_multiplier: float) -> Mechanism:
    """The noise of each of the run's releases, over theta and what devices add beside it.

    Raises:
        PrivacyError: nothing of the budget is left for theta.
    """
    privacy = config.privacy
    return mechanism_for(
        privacy,
        noise_multiplier=noise_multiplier,
        sizes=block_sizes(
            num_values,
            norm_bit=privacy.adaptive_clip is not None,
            metrics=metric_bounds(privacy),
        ),
        expected_size=config.cohort.expected_size,
    )


def recipe_of(config: RunConfig) -> LocalRecipe:
    """What devices do; in mode ``example_level`` with the promise that they keep themselves."""
    privacy = config.privacy
    if privacy.mode != "example_level":
        return config.local
    example_privacy = ExamplePrivacy.model_validate(
        {name: getattr(privacy, name) for name in ExamplePrivacy.model_fields}
    )
    return config.local.model_copy(update={"example_privacy": example_privacy})
