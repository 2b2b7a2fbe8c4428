"""What a device has spent of its examples' privacy, and how much noise the rest of it takes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import numpy as np
from pydantic import Field

from carpool.errors import PrivacyError
from carpool.rdp import RenyiCurve, noise_multiplier_for_steps, subsampled_gaussian
from carpool.recipe import ExamplePrivacy, LocalRecipe
from carpool.schema import Model
from carpool.theta import Layout
from carpool_device.example_noise import sampler_error


class ExampleBudget(Model):
    """What a device has spent: it keeps this for as long as it keeps examples.

    Whoever owns it stores what ``charged`` gives, durably, before the training begins, and never
    puts an older one back: a training that fails on the way tells that it did.

    Attributes:
        participations: rounds that the device has trained in.
        spent: what they cost together.
    """

    participations: Annotated[int, Field(ge=0)] = 0
    spent: RenyiCurve = RenyiCurve()

    @staticmethod
    def after(
        participations: int, *, num_examples: int, layout: Layout, recipe: LocalRecipe
    ) -> ExampleBudget:
        """Of a device whose examples and recipe have never changed: a simulation's.

        Guarantees: what the device itself would have stored, to the bit: its life is planned
        once more, round by round (and plans are remembered by the process).

        Args:
            participations: how often it has trained; beyond the cap nothing more was spent.
            num_examples: how many it holds; at least 1.
            layout: of theta.
            recipe: with ``example_privacy``.

        Raises:
            PrivacyError: the recipe has none, or its budget cannot be kept by any noise.
        """
        privacy, _ = _private(recipe)
        budget = ExampleBudget()
        for _ in range(min(participations, privacy.max_participations)):
            charged = budget.charged(num_examples=num_examples, layout=layout, recipe=recipe)
            budget = charged.budget
        return ExampleBudget(participations=participations, spent=budget.spent)

    def charged(self, *, num_examples: int, layout: Layout, recipe: LocalRecipe) -> ExampleSpending:
        """What the next participation costs, and what will have been spent with it.

        Guarantees: a function of its arguments; ``train_locally`` comes to the same.

        Args:
            num_examples: how many the device holds; at least 1.
            layout: of theta.
            recipe: with ``example_privacy``.

        Raises:
            PrivacyError: no ``example_privacy``, no participation is left, or no noise is large
                enough.
        """
        privacy, _ = _private(recipe)
        num_values = int(np.count_nonzero(layout.group_mask(recipe.train)))
        plan = _planned(self, num_examples, num_values, recipe)
        after = ExampleBudget(participations=self.participations + 1, spent=self.spent + plan.cost)
        return ExampleSpending(
            plan=plan, budget=after, epsilon=after.spent.epsilon(delta=privacy.delta)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """The noise of one participation: the least if all that are to come are like it.

    Guarantees: what was spent and the participations that are left, this one included, keep the
    recipe's epsilon and delta, the sampler's error charged. Neither the examples nor any
    randomness goes in: their number does.

    Attributes:
        noise_multiplier: z, the noise's standard deviation over C, before the slack.
        sampling_rate: q, with which each example is drawn in each step.
        steps: of the participation.
        cost: of all its steps.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    cost: RenyiCurve


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSpending:
    """What a participation cost. For the device's own books: it tells the number of examples.

    Attributes:
        plan: its noise.
        budget: after it.
        epsilon: of one example, over all participations so far, at the recipe's delta.
    """

    plan: NoisePlan
    budget: ExampleBudget
    epsilon: float


@functools.lru_cache(maxsize=4096)
def _planned(
    budget: ExampleBudget, num_examples: int, num_values: int, recipe: LocalRecipe
) -> NoisePlan:
    privacy, steps = _private(recipe)
    left = privacy.max_participations - budget.participations
    if left < 1:
        raise PrivacyError(
            f"expected fewer than {privacy.max_participations} participations, which the "
            f"recipe allows, got {budget.participations}: the device must not train again."
        )
    rate = min(1.0, recipe.batch_size / num_examples)
    sampler = sampler_error(num_values).times(steps)
    z = noise_multiplier_for_steps(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=rate,
        steps=steps * left,
        spent=budget.spent + sampler.times(left),
    )
    step = subsampled_gaussian(noise_multiplier=z, sampling_rate=rate)
    return NoisePlan(
        noise_multiplier=z, sampling_rate=rate, steps=steps, cost=step.times(steps) + sampler
    )


def _private(recipe: LocalRecipe) -> tuple[ExamplePrivacy, int]:
    if recipe.example_privacy is None or recipe.steps is None:
        raise PrivacyError("expected a recipe with example_privacy, got one without.")
    return recipe.example_privacy, recipe.steps
