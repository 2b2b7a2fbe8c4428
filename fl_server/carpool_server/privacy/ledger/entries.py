"""What stands in a ledger's lines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from carpool.privacy import Delta, PositiveFloat, PositiveInt, Regime
from carpool.schema import Model, Sha256
from carpool_server.privacy.accounting import Release

LEDGER_VERSION: Literal[1] = 1

Count = Annotated[int, Field(ge=0)]


class Promise(Model):
    """What is promised to whom: the same for all runs over a population.

    Attributes:
        population: whose ledger it is.
        unit: what one unit of data is.
        regime: what epsilon is computed from (``carpool.privacy.PrivacyConfig``).
        epsilon, delta: the budget over all runs.
        max_participations: the cap, in regime ``participation-cap``.
    """

    kind: Literal["opened"] = "opened"
    version: Literal[1] = LEDGER_VERSION
    population: str
    unit: str
    regime: Regime
    epsilon: PositiveFloat
    delta: Delta
    max_participations: PositiveInt | None = None


class Charge(Model):
    """One round's price, written before its noise is drawn.

    Attributes:
        run_id, round_number: which release.
        noise_multiplier: z of everything released together.
        sampling_rate: q; 1 where nothing is claimed for the draw.
        clip_norm: C, in theta's units.
        sigma: standard deviation of the noise on theta's sum, in theta's units.
        num_values: noised integers.
        scale: the least standard deviation among them, in grid units.
        expected_size: the fixed denominator.
    """

    run_id: str
    round_number: PositiveInt
    noise_multiplier: PositiveFloat
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    clip_norm: PositiveFloat
    sigma: PositiveFloat
    num_values: PositiveInt
    scale: PositiveInt
    expected_size: PositiveFloat

    @property
    def release(self) -> Release:
        """As the accountants take it."""
        return Release(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            num_values=self.num_values,
            scale=self.scale,
        )


class Charged(Model):
    """A charge as it stands in the ledger.

    Attributes:
        charge: the price.
        epsilon: spent by all charges up to this one.
        method: how it was computed.
        at: UTC, RFC 3339.
    """

    kind: Literal["charged"] = "charged"
    charge: Charge
    epsilon: Annotated[float, Field(ge=0)]
    method: str
    at: str


class Released(Model):
    """A noised theta is about to leave.

    Attributes:
        run_id, round_number: which.
        theta: SHA-256 of its values (float32, little-endian).
        contributors: devices whose updates are in it. For the operator alone: who knows all
            others' participation learns somebody's from it.
        largest_participation: most rounds of all runs that any device is in, this one included.
        at: UTC, RFC 3339.
    """

    kind: Literal["released"] = "released"
    run_id: str
    round_number: PositiveInt
    theta: Sha256
    contributors: Count
    largest_participation: Count
    at: str


Entry = Annotated[Promise | Charged | Released, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[Promise | Charged | Released] = TypeAdapter(Entry)


def parse_entry(value: dict[str, Any]) -> Promise | Charged | Released:
    """One line's entry.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return _ADAPTER.validate_python(value)
