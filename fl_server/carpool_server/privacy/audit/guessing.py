"""Who was in: scores of the canaries, and how many of them are guessed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from carpool_server.hooks import RoundFacts
from carpool_server.privacy.audit.bounds import Guesses, epsilon_bound

_MARGIN = 1.0
"""How far above the stated epsilon a system that hides nothing must be seen to be."""

_TRIALS = 16
_PLAN_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channel:
    """What is claimed to lie between a canary and one round's release.

    Attributes:
        noise_multiplier: of theta's values.
        rate: how likely a canary takes part.
    """

    noise_multiplier: float
    rate: float

    def scores(self, seen: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log likelihood ratio of "in" over "out" for values in units of the clip."""
        odds = (2 * seen - 1) / (2 * self.noise_multiplier**2)
        if self.rate == 1:
            return odds
        return np.logaddexp(math.log1p(-self.rate), math.log(self.rate) + odds)


class Scores:
    """A hook that adds up each canary's score over the rounds.

    The sum is the best that there is to see under the claimed mechanism (Neyman and Pearson);
    under any other it is a function of what was released, which is all that a bound asks.

    Attributes:
        total: float64, shape ``(canaries,)``.

    Args:
        canaries: how many.
        channel: as claimed, for every round.
        expected_size: the mean's fixed denominator.
    """

    def __init__(self, canaries: int, *, channel: Channel, expected_size: float) -> None:
        self.total = np.zeros(canaries)
        self._channel, self._expected_size = channel, expected_size
        self._theta = np.zeros(canaries)

    def after_round(self, facts: RoundFacts) -> None:
        """One released step of the mean, in units of the round's clip."""
        theta = facts.theta.astype(np.float64)
        step = (theta - self._theta) * (self._expected_size / facts.record.clip_norm)
        self.total += self._channel.scores(step)
        self._theta = theta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How many canaries are guessed, fixed before anything is released.

    Attributes:
        high: as many of the highest scores are guessed "in".
        low: as many of the lowest "out".
    """

    high: int
    low: int

    @property
    def guesses(self) -> int:
        """All of them."""
        return self.high + self.low

    def guess(self, scores: NDArray[np.float64], coins: NDArray[np.bool_]) -> Guesses:
        """What comes of it.

        Args:
            scores: float64, shape ``(canaries,)``.
            coins: bool, same shape: who was in.
        """
        order = np.argsort(scores, kind="stable")
        correct = int(np.count_nonzero(coins[order[coins.size - self.high :]]))
        correct += int(np.count_nonzero(~coins[order[: self.low]]))
        return Guesses(canaries=coins.size, guesses=self.guesses, correct=correct)


def make_plan(
    canaries: int,
    *,
    channel: Channel,
    rounds: int,
    epsilon: float,
    delta: float,
    confidence: float,
) -> Plan | None:
    """The number of guesses, by simulation of what is claimed.

    Guarantees: a function of its arguments alone, as the bounds ask. Among the numbers with
    which a system without noise would be seen to have at least ``epsilon + 1``, those with the
    largest bound for the claimed mechanism. Half of the guesses are "out", or none: a canary
    that is in and never drawn looks like one that is out. None: no number would do, more
    canaries are needed.
    """

    def bound(plan: Plan, correct: int) -> float:
        found = Guesses(canaries=canaries, guesses=plan.guesses, correct=correct)
        return epsilon_bound(found, delta=delta, confidence=confidence)

    numbers = sorted({min(canaries, round(25 * 2 ** (n / 2))) for n in range(40)})
    plans = [Plan(high=n, low=0) for n in numbers]
    plans += [Plan(high=n - n // 2, low=n // 2) for n in numbers]
    plans = [plan for plan in plans if bound(plan, plan.guesses) >= epsilon + _MARGIN]
    claimed, bare = dict.fromkeys(plans, 0), dict.fromkeys(plans, 0)
    generator = np.random.default_rng(_PLAN_SEED)
    for _ in range(_TRIALS if plans else 0):
        coins = generator.integers(0, 2, size=canaries).astype(np.bool_)
        scores, without_noise = np.zeros(canaries), np.zeros(canaries)
        for _ in range(rounds):
            drawn = coins & (generator.random(canaries) < channel.rate)
            noise = channel.noise_multiplier * generator.standard_normal(canaries)
            scores += channel.scores(drawn + noise)
            without_noise += channel.scores(drawn.astype(np.float64))
        for plan in plans:
            claimed[plan] += plan.guess(scores, coins).correct
            bare[plan] += plan.guess(without_noise, coins).correct
    plans = [plan for plan in plans if bound(plan, bare[plan] // _TRIALS) >= epsilon + _MARGIN]
    return max(plans, key=lambda plan: bound(plan, claimed[plan] // _TRIALS), default=None)
