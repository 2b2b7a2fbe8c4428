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


def guess(scores: NDArray[np.float64], coins: NDArray[np.bool_], *, guesses: int) -> Guesses:
    """Guesses "in" for the highest scores and "out" for the lowest, half each.

    Args:
        scores: float64, shape ``(canaries,)``.
        coins: bool, same shape: who was in.
        guesses: how many in all.
    """
    order = np.argsort(scores, kind="stable")
    low = guesses // 2
    high = guesses - low
    correct = int(np.count_nonzero(coins[order[coins.size - high :]]))
    correct += int(np.count_nonzero(~coins[order[:low]]))
    return Guesses(canaries=coins.size, guesses=guesses, correct=correct)


def planned_guesses(
    canaries: int,
    *,
    channel: Channel,
    rounds: int,
    epsilon: float,
    delta: float,
    confidence: float,
) -> int | None:
    """How many guesses to take, before anything is released.

    Guarantees: a function of its arguments alone, as the bounds ask. Among the numbers with
    which all guesses right would show at least ``epsilon + 1``, so that a system that hides
    nothing is seen, the one with the largest bound for the claimed mechanism (16 simulated
    runs of it). None: there is no such number; more canaries are needed.
    """

    def bound(guesses: int, correct: int) -> float:
        found = Guesses(canaries=canaries, guesses=guesses, correct=correct)
        return epsilon_bound(found, delta=delta, confidence=confidence)

    choices = {min(canaries, round(25 * 2 ** (n / 2))) for n in range(40)}
    enough = [n for n in sorted(choices) if bound(n, n) >= epsilon + _MARGIN]
    if not enough:
        return None
    generator = np.random.default_rng(_PLAN_SEED)
    correct = dict.fromkeys(enough, 0)
    for _ in range(_TRIALS):
        coins = generator.integers(0, 2, size=canaries).astype(np.bool_)
        scores = np.zeros(canaries)
        for _ in range(rounds):
            takes_part = coins & (generator.random(canaries) < channel.rate)
            noise = channel.noise_multiplier * generator.standard_normal(canaries)
            scores += channel.scores(takes_part + noise)
        for guesses in enough:
            correct[guesses] += guess(scores, coins, guesses=guesses).correct
    return max(enough, key=lambda guesses: bound(guesses, correct[guesses] // _TRIALS))
