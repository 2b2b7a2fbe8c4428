"""The local recipe: what a device does with its examples, as data, versioned, in every task."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from carpool.schema import Model
from carpool.theta import Group

PLAIN_GRADIENT_CLIP = 1e30
"""A per-example bound so large that clipping to it gives the plain gradient."""


class ExamplePrivacy(Model):
    """DP-SGD on the device: what it must keep for each of its own examples.

    Attributes:
        epsilon, delta: the budget of one example of this device, over all its participations.
        max_participations: in how many rounds the device may train at most.
    """

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    max_participations: Annotated[int, Field(ge=1)]


class LocalRecipe(Model):
    """How one device trains in one round. An unknown field is refused.

    The update rule is host arithmetic in float32, one rounding per operation, nothing fused:
    ``theta -= learning_rate * gradient``; with a proximal weight the gradient is first
    increased by ``proximal_weight * (theta - start)``.

    Attributes:
        version: of this schema.
        learning_rate: in theta's own units.
        epochs: passes over the device's examples; exactly one of ``epochs`` and ``steps``.
        steps: batches, going round the examples as often as needed.
        batch_size: most rows in a batch; the last one of an epoch may be smaller. A batch's
            example weights are 1 / its rows. With ``example_privacy`` the expected number of
            rows, by which sums are divided; it may be more than the program takes at once.
        max_examples: most examples used in a round: the first of the shuffled order. Caps
            nothing with ``example_privacy``, which draws from all of a device's examples.
        proximal_weight: FedProx's mu (Li et al., 2020, arXiv 1812.06127); 0 switches it off.
        example_clip_norm: per-example L2 bound over theta; None takes the plain gradient.
        train: the groups that move; the others' gradient is set to zero.
        example_privacy: DP-SGD instead: Poisson draws of ``batch_size`` examples in
            expectation, each clipped to ``example_clip_norm``, and noise; needs that and
            ``steps``. None trains without.
    """

    version: Literal[1] = 1
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    max_examples: Annotated[int, Field(ge=1)] = 32
    proximal_weight: Annotated[float, Field(ge=0)] = 0.0
    example_clip_norm: Annotated[float, Field(gt=0)] | None = None
    train: tuple[Group, ...] = ("adapter", "head")
    example_privacy: ExamplePrivacy | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"expected exactly one of epochs and steps, got epochs={self.epochs} and "
                f"steps={self.steps}"
            )
        if not self.train or len(set(self.train)) != len(self.train):
            raise ValueError(f"expected one or two distinct groups to train, got {self.train}")
        if self.example_privacy and (self.steps is None or self.example_clip_norm is None):
            raise ValueError(
                f"example_privacy needs steps and example_clip_norm, got steps={self.steps} and "
                f"example_clip_norm={self.example_clip_norm}"
            )
        return self

    @property
    def l2_clip_norm(self) -> float:
        """The bound handed to the program's ``gradients``."""
        return PLAIN_GRADIENT_CLIP if self.example_clip_norm is None else self.example_clip_norm
