"""A run's settings: one schema for the file, the flags, the checkpoint and the report.

``PrivacyConfig`` and ``CohortConfig`` change the guarantee; ``SimulationConfig`` changes the
speed and nothing else; the rest changes what is learned. A run may be resumed with another
``SimulationConfig`` and with nothing else changed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from carpool.errors import ConfigError
from carpool.privacy import PositiveFloat, PositiveInt, PrivacyConfig
from carpool.recipe import LocalRecipe
from carpool.schema import Model, describe

Fraction = Annotated[float, Field(ge=0, lt=1)]


class CohortConfig(Model):
    """Who takes part in a round, and when a round ends.

    Attributes:
        expected_size: devices are drawn independently with probability expected_size / N
            (Poisson sampling); the fixed denominator of every mean. At most N.
        quorum: share of the drawn devices whose updates must be there before a release.
        deadline_seconds: after this long a round with its quorum ends without the rest.
        extensions: how often a round below its quorum gets another deadline before the run
            stops (nothing of it is released).
    """

    expected_size: PositiveFloat
    quorum: Annotated[float, Field(ge=0, le=1)] = 0.8
    deadline_seconds: PositiveFloat = 600.0
    extensions: Annotated[int, Field(ge=0)] = 3


class SgdConfig(Model):
    """Server SGD on the mean update: ``v = momentum * v + mean; theta += rate * v``."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat
    momentum: Fraction = 0.0
    hold: Annotated[float, Field(ge=0, le=1)] = 1.0


class AdamConfig(Model):
    """Server Adam on the mean update (FedAdam: Reddi et al., 2021, arXiv 2003.00295)."""

    kind: Literal["adam"] = "adam"
    learning_rate: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: PositiveFloat = 1e-4
    hold: Annotated[float, Field(ge=0, le=1)] = 1.0


ServerConfig = Annotated[SgdConfig | AdamConfig, Field(discriminator="kind")]
"""``hold`` is the share of the rounds at the full rate; after it the rate falls linearly to 0."""


class SimulationConfig(Model):
    """How the simulation is spread out. Changes its speed and nothing else.

    Attributes:
        aggregators: Flower nodes; each speaks for its share of the devices.
        cpus_per_aggregator: what Ray reserves for one aggregator at work; its runtime takes as
            many threads (rounded down, at least one).
        ray_address: an existing Ray cluster to join, or None to start Ray on this machine.
    """

    aggregators: PositiveInt = 2
    cpus_per_aggregator: PositiveFloat = 1.0
    ray_address: str | None = None


class RunConfig(Model):
    """All settings of one federated run.

    Attributes:
        rounds: how many.
        seed: of every reproducible choice; privacy noise and, in private modes, the cohorts
            are not among them.
    """

    rounds: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**53)]  # what JSON numbers carry exactly
    privacy: PrivacyConfig
    cohort: CohortConfig
    local: LocalRecipe
    server: ServerConfig
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.privacy.mode == "example_level":
            missing = [n for n in ("steps", "example_clip_norm") if getattr(self.local, n) is None]
            if missing:
                raise ValueError(
                    f"privacy.mode 'example_level' needs local.{' and local.'.join(missing)}"
                )
        if self.local.example_privacy is not None:
            raise ValueError("local.example_privacy must be left out: it is made from [privacy]")
        return self


def load_config(path: Path, *, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a TOML file and applies ``key=value`` overrides (values in TOML's own syntax).

    Args:
        path: the settings file.
        overrides: for example ``"privacy.epsilon=8"`` or ``"cohort.expected_size=50"``; a
            value that is no TOML is taken as a string.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (the nearest known one is named), a
            value out of range, or an override without ``=``.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a settings file, got: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: expected TOML, got: {error}") from error
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validates settings; ``source`` names them in errors.

    Raises:
        ConfigError: one line per mistake.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error, RunConfig)}") from error


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """``"name: old -> new"`` for every setting that differs and may not (all but simulation)."""
    old, new = (
        _flatten(c.model_dump(mode="json", exclude={"simulation"})) for c in (before, after)
    )
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"expected key=value, got {override!r}; for example privacy.epsilon=8.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    *path, last = name.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name.strip()}: {part} is a value and not a section.")
    values[last] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
