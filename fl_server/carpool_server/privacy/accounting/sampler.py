"""What it costs that the noise is only almost Gaussian."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from carpool.errors import PrivacyError
from carpool.gaussian import TAIL_PROBABILITY, log_ratio_bound
from carpool_server.privacy.accounting.releases import Release

_DELTA_SHARE = 1e-3
"""How much of delta is kept for the sampler."""


@dataclasses.dataclass(frozen=True)
class Slack:
    """How far our noise is from the ideal one, over all releases that count.

    Attributes:
        log_ratio: a: log probabilities differ by at most this, where ours are not 0.
        tail: t: what the ideal noise has where ours has nothing.
    """

    log_ratio: float
    tail: float

    @classmethod
    def of(cls, releases: Sequence[Release], *, at_most: int | None = None) -> Slack:
        """The slack of all releases, or of those ``at_most`` many for which it is largest."""
        ratios = sorted((r.num_values * log_ratio_bound(r.scale) for r in releases), reverse=True)
        values = sorted((r.num_values for r in releases), reverse=True)
        return cls(math.fsum(ratios[:at_most]), sum(values[:at_most]) * TAIL_PROBABILITY)


def with_slack(ideal: Callable[[float], float], *, delta: float, slack: Slack) -> float:
    """Epsilon at ``delta`` of our noise, from epsilon of the ideal one.

    Guarantees: if the ideal mechanism is (epsilon, delta_0)-DP, ours is (epsilon + 2 a,
    exp(a) * (delta_0 + exp(epsilon) * t))-DP. Let P, Q be the ideal outputs of neighbours, P',
    Q' ours. By the sampler's bound P'(S) <= exp(a) P(S) and Q(S) <= exp(a) Q'(S) + t, so P'(S)
    <= exp(a) (exp(epsilon) Q(S) + delta_0) <= exp(epsilon + 2 a) Q'(S) + exp(a) (delta_0 +
    exp(epsilon) t). delta_0 is 0.999 of delta, and the rest is checked to be enough.

    Args:
        ideal: epsilon of the ideal mechanism at a delta.
        delta: of the result.
        slack: of our noise; at 0 nothing is kept for it.

    Raises:
        PrivacyError: the sampler's error is more than it may be.
    """
    if slack == Slack(0.0, 0.0):
        return ideal(delta)
    kept = delta * (1 - _DELTA_SHARE)
    epsilon = ideal(kept)
    # as a share of delta, in logs: exp(epsilon) may be no float64
    tail = math.exp(min(700.0, math.log(slack.tail) + epsilon - math.log(delta)))
    if math.exp(slack.log_ratio) * ((1 - _DELTA_SHARE) + tail) > 1:
        raise PrivacyError(
            f"noise sampler: expected its error within {_DELTA_SHARE:g} of delta {delta:g}, got "
            f"{math.expm1(slack.log_ratio) + tail:.3g} at epsilon {epsilon:.4g}. Raise the noise "
            "multiplier or delta, or release fewer values."
        )
    return epsilon + 2 * slack.log_ratio
