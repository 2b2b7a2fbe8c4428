"""What a run may say of its privacy, in sentences: the same wherever it is said."""

from __future__ import annotations

from carpool.privacy import PrivacyConfig
from carpool_server.checkpoint import RunInfo
from carpool_server.privacy.accounting import Epsilon, rounded_up
from carpool_server.promise import UNIT

ENDINGS = {"budget": "budget", "participation-cap": "participation cap"}


def privacy_statement(info: RunInfo) -> list[str]:
    """What was promised, spent, or projected, with unit, neighbours and method; a line each."""
    privacy = info.config.privacy
    lines = []
    if info.ended is not None:
        lines.append(
            f"The run ended at its {ENDINGS[info.ended]}, after round {info.round_number} of "
            f"{info.config.rounds}."
        )
    match privacy.mode:
        case "none":
            pass
        case "central":
            lines.append(_central(info))
        case "example_level":
            lines.append(
                f"privacy: each device keeps epsilon {privacy.epsilon:g} at delta "
                f"{privacy.delta:g} for each of its own examples, over at most "
                f"{privacy.max_participations} rounds, against whoever sees its updates, this "
                "server included; unit: one example of one device; neighbouring: add or remove "
                "it, where the number of examples is known."
            )
        case "projection":
            lines.append(_projection(privacy, population=info.population.size))
    return lines


def epsilon_label(privacy: PrivacyConfig) -> str:
    """How the ledger computes epsilon for these settings, in words."""
    capped = privacy.regime == "participation-cap"
    return Epsilon(
        value=0.0,
        delta=privacy.delta or 0.0,
        method="gaussian" if capped else "prv",
        regime=privacy.regime or "poisson",
    ).describe()


def _central(info: RunInfo) -> str:
    privacy = info.config.privacy
    epsilon = info.history[-1].epsilon if info.history else 0.0
    spent = f"privacy: epsilon {rounded_up(epsilon or 0.0, 2)} at delta {privacy.delta:g} was spent"
    if privacy.max_participations is not None:
        spent += (
            f", and at most {privacy.epsilon:g} ever is, by the cap of "
            f"{privacy.max_participations} rounds"
        )
    return f"{spent}; unit: {UNIT} ({epsilon_label(privacy)})."


def _projection(privacy: PrivacyConfig, *, population: int) -> str:
    imagined = privacy.projection
    if imagined is None:
        raise ValueError("Expected a validated PrivacyConfig.")
    return (
        f"PROJECTION, no guarantee: trained with the noise that a population of "
        f"{imagined.population} with cohorts of {imagined.cohort:g} would need for epsilon "
        f"{privacy.epsilon:g} at delta {privacy.delta:g}. No epsilon was achieved for the "
        f"{population} devices that trained here."
    )
