"""What is promised about anybody's data: the settings that can change the guarantee, no others.

With ``rounds`` and ``cohort.expected_size``, which they are composed over, these are all that
the guarantee depends on.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from carpool.schema import Model

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
SMALLEST_CLIP, LARGEST_CLIP = 1e-35, 1e35
"""Of a device's update, in theta's units: what float32 and the grid can follow."""

ClipNorm = Annotated[float, Field(ge=SMALLEST_CLIP, le=LARGEST_CLIP)]
NoiseMultiplier = Annotated[float, Field(ge=2.0**-13, le=2.0**18)]
BitNoise = Annotated[float, Field(ge=1e-3, le=1e9)]
Delta = Annotated[float, Field(gt=0, lt=1)]

Mode = Literal["none", "central", "example_level", "projection"]
Regime = Literal["poisson", "participation-cap"]


class AdaptiveClip(Model):
    """The clip follows a quantile of the updates' norms (Andrew et al., 2021, arXiv 1905.03871).

    Attributes:
        target_quantile: the share of updates that should be within the clip.
        learning_rate: of the geometric rule ``C *= exp(-rate * (share - target))``.
        bit_noise: standard deviation of the noise on the sum of bits, in bits; None takes a
            twentieth of the expected cohort, as the paper does, and more for small cohorts.
    """

    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: PositiveFloat = 0.2
    bit_noise: BitNoise | None = None


class MetricBounds(Model):
    """What devices' numbers are clipped to before they are added.

    Attributes:
        max_loss: nats.
        max_examples: of one device in a round.
    """

    max_loss: PositiveFloat = 10.0
    max_examples: PositiveInt = 32


class PrivateMetrics(MetricBounds):
    """Contributors, loss, hit@1 and examples of a round, noised with a share of the budget.

    Attributes:
        budget_share: their share of ``1 / noise_multiplier**2``, the rest is theta's.
    """

    budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.05


class Projection(Model):
    """A population that is imagined: its cohort's noise is what is added here.

    Attributes:
        population: devices that could be drawn.
        cohort: devices expected in a round.
    """

    population: PositiveInt
    cohort: PositiveFloat

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.cohort > self.population:
            raise ValueError(
                f"expected a cohort of at most the population of {self.population}, got "
                f"{self.cohort:g}"
            )
        return self


_NEEDS: dict[Mode, tuple[str, ...]] = {
    "none": (),
    "central": ("epsilon", "delta", "regime"),
    "example_level": ("epsilon", "delta", "max_participations"),
    "projection": ("epsilon", "delta", "projection"),
}
_MAY: dict[Mode, tuple[str, ...]] = {
    "none": ("adaptive_clip", "metrics"),
    "central": ("max_participations", "noise_multiplier", "adaptive_clip", "metrics"),
    "example_level": (),
    "projection": ("adaptive_clip", "metrics"),
}
_GIVEN_BY_MODE = (
    "epsilon",
    "delta",
    "regime",
    "max_participations",
    "noise_multiplier",
    "adaptive_clip",
    "metrics",
    "projection",
)


class PrivacyConfig(Model):
    """What is promised about any one subject's data. The mode has no default.

    Attributes:
        mode: ``"none"``: nothing is promised, no noise. ``"central"``: the operator sees
            updates, the world sees only noised sums; the unit is one client, over all rounds.
            ``"example_level"``: devices add noise themselves; the unit is one example of one
            device, and whoever sees that device's updates is the adversary.
            ``"projection"``: nothing is promised; the noise of a stated, larger population, to
            see what training would cost there.
        clip_norm: C, the joint L2 bound on a device's update, in theta's units; in all modes.
            With ``adaptive_clip`` the first round's.
        epsilon: the budget: in ``central`` over all rounds and runs of the population, in
            ``example_level`` of each device's example, in ``projection`` of the population
            that is imagined.
        delta: its delta.
        regime: what epsilon is computed from (``central``). ``"poisson"``: the server draws
            every registered client independently in every round, with a secret key;
            neighbouring: add or remove one client. ``"participation-cap"``: a client is in at
            most ``max_participations`` rounds, whichever they are; nothing is claimed for the
            draw; neighbouring: what one client adds to the sums becomes zero, its participations
            stay.
        max_participations: the cap.
        noise_multiplier: the noise's standard deviation over C; None takes the least that
            keeps the budget over ``rounds``. With a value the run ends where the budget does.
        adaptive_clip: lets C follow the updates; None keeps it.
        metrics: noised metrics of the devices; None tells nothing about them (mode ``none``
            tells the exact training loss).
        projection: the imagined population.
    """

    mode: Mode
    clip_norm: ClipNorm
    epsilon: PositiveFloat | None = None
    delta: Delta | None = None
    regime: Regime | None = None
    max_participations: PositiveInt | None = None
    noise_multiplier: NoiseMultiplier | None = None
    adaptive_clip: AdaptiveClip | None = None
    metrics: PrivateMetrics | None = None
    projection: Projection | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        needed, given = _NEEDS[self.mode], self._given()
        missing = [name for name in needed if name not in given]
        if missing:
            hint = " ('poisson' or 'participation-cap')" if "regime" in missing else ""
            raise ValueError(f"mode {self.mode!r} needs {', '.join(missing)}{hint}")
        allowed = (*needed, *_MAY[self.mode])
        if self.mode == "none" and (extra := [name for name in given if name not in allowed]):
            raise ValueError(
                f"mode 'none' promises nothing, so {' and '.join(extra)} must be left out "
                "(or set mode = 'central')"
            )
        if extra := [name for name in given if name not in allowed]:
            raise ValueError(f"mode {self.mode!r} has no use for {' and '.join(extra)}")
        if self.regime is not None:
            capped = self.regime == "participation-cap"
            if capped != (self.max_participations is not None):
                raise ValueError(
                    "regime 'participation-cap' needs max_participations"
                    if capped
                    else f"regime {self.regime!r} has no use for max_participations"
                )
        return self

    def _given(self) -> list[str]:
        return [name for name in _GIVEN_BY_MODE if getattr(self, name) is not None]
