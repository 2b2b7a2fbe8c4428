"""The accountant that fits on a phone: Renyi differential privacy of subsampled Gaussian noise.

Renyi divergences at fixed integer orders add up over steps, however unequal the steps are, so a
device that gains examples keeps one short list of numbers and no history. The price is a bound
that is a little loose: ``docs/device.md`` says how much.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from carpool.errors import PrivacyError
from carpool.schema import Model

ORDERS: tuple[int, ...] = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 384, 512)
"""The Renyi orders. Low ones decide large epsilons, high ones small epsilons."""

NOISE_STEP = 1e-3
"""Noise multipliers are whole multiples of this, rounded up."""

_LEAST_STEPS, _MOST_STEPS = 50, 100_000_000

LEAST_NOISE = _LEAST_STEPS / 1000
"""No smaller noise multiplier is ever given: below it noise hides nothing."""

_Divergence = Annotated[float, Field(ge=0)]
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-100, 1e100  # their squares are finite and not 0
_LARGEST = 1e300  # an infinity could not be stored


class RenyiCurve(Model):
    """What steps have cost so far, as numbers that add up: ``a + b``, ``a.times(n)``.

    A mechanism whose noise is not quite Gaussian is charged for that: every probability of all
    its draws together is the ideal one's times a factor within ``exp(+-log_ratio)``, but for
    ``tail``, what the ideal one has where it has nothing.

    Attributes:
        version: of the orders.
        rdp: the Renyi divergence (nats) at each of ``ORDERS``, an upper bound.
        log_ratio: see above; adds up over draws.
        tail: see above; adds up over draws.
    """

    version: Literal[1] = 1
    rdp: tuple[_Divergence, ...] = (0.0,) * len(ORDERS)
    log_ratio: _Divergence = 0.0
    tail: _Divergence = 0.0

    @model_validator(mode="after")
    def _has_every_order(self) -> Self:
        if len(self.rdp) != len(ORDERS):
            raise ValueError(f"expected {len(ORDERS)} divergences, got {len(self.rdp)}")
        return self

    def __add__(self, other: RenyiCurve) -> RenyiCurve:
        """Both, one after the other; the second may depend on what the first released."""
        return RenyiCurve(
            rdp=tuple(min(a + b, _LARGEST) for a, b in zip(self.rdp, other.rdp, strict=True)),
            log_ratio=self.log_ratio + other.log_ratio,
            tail=self.tail + other.tail,
        )

    def times(self, count: int) -> RenyiCurve:
        """The same ``count`` times over.

        Raises:
            ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"Expected a count of 0 or more, got {count}.")
        return RenyiCurve(
            rdp=tuple(min(count * value, _LARGEST) for value in self.rdp),
            log_ratio=count * self.log_ratio,
            tail=count * self.tail,
        )

    def epsilon(self, *, delta: float) -> float:
        """The least epsilon that this shows at ``delta``: 0 for nothing, infinity for no bound.

        Guarantees: whatever has this curve is (epsilon, delta)-differentially private.

        How: the ideal mechanism's (e, d) becomes (e + 2 a, exp(a) (d + exp(e) t)) with
        a = ``log_ratio`` and t = ``tail``; so e is looked for at d = delta exp(-a) - exp(e) t.

        Raises:
            ValueError: delta is not in (0, 1).
        """
        if not 0 < delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
        ideal, before = 0.0, -1.0
        while ideal != before:  # it only grows, and exp(e) t is tiny or it ends below
            before = ideal
            left = delta * math.exp(-self.log_ratio) - math.exp(min(ideal, 700.0)) * self.tail
            if left <= 0 or ideal > _LARGEST:
                return math.inf
            ideal = max(ideal, _ideal_epsilon(self.rdp, delta=left))
        return ideal + 2 * self.log_ratio


def subsampled_gaussian(*, noise_multiplier: float, sampling_rate: float) -> RenyiCurve:
    """One step: examples drawn independently, each with norm at most C, and noise z C on the sum.

    Guarantees: an upper bound on the Renyi divergences between the step's results with and
    without one example, both ways round.

    With q the sampling rate and z the noise multiplier, at order a

        log(sum over k of binom(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 z^2))) / (a - 1);

    k = 0 and 1 have exponent 0, so the sum is 1 + the same sum with ``exp(..) - 1`` from k = 2
    on: all terms are positive, and small divergences keep their digits. a / (2 z^2) at q = 1.

    Args:
        noise_multiplier: z, the noise's standard deviation over C, from 1e-100 to 1e100.
        sampling_rate: q, in (0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source: Mironov, Talwar and Zhang (2019), arXiv 1908.10530, section 3.3.
    """
    if not _SMALLEST_NOISE <= noise_multiplier <= _LARGEST_NOISE:
        raise ValueError(
            f"Expected a noise multiplier of {_SMALLEST_NOISE} to {_LARGEST_NOISE}, got "
            f"{noise_multiplier}."
        )
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate <= 1, got {sampling_rate}.")
    return _one_step(noise_multiplier, sampling_rate)


def epsilon_of_steps(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float
) -> float:
    """Epsilon of ``steps`` equal steps with ideal noise: ``subsampled_gaussian``, added up.

    Raises:
        ValueError: an argument is out of range.
    """
    step = subsampled_gaussian(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    return step.times(steps).epsilon(delta=delta)


def noise_multiplier_for_steps(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, spent: RenyiCurve
) -> float:
    """The least noise multiplier with which ``steps`` more steps keep the budget.

    Guarantees: a whole multiple of ``NOISE_STEP``, at least ``LEAST_NOISE``, such that ``spent``
    and the steps together have at most ``epsilon`` at ``delta``; one ``NOISE_STEP`` less would
    have more, or be below ``LEAST_NOISE``. It is the double nearest to that decimal.

    Args:
        epsilon: the whole budget.
        delta: its delta.
        sampling_rate: of each of the steps.
        steps: how many are still to come; at least 1.
        spent: what was spent before, with what the sampler's error will cost over the steps.

    Raises:
        PrivacyError: no noise is large enough.
        ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"Expected at least 1 step, got {steps}.")

    def fits(thousandths: int) -> bool:
        step = subsampled_gaussian(noise_multiplier=thousandths / 1000, sampling_rate=sampling_rate)
        return (spent + step.times(steps)).epsilon(delta=delta) <= epsilon

    high = _LEAST_STEPS
    while not fits(high):
        if high == _MOST_STEPS:
            raise PrivacyError(
                f"no noise is large enough for {steps} more steps within epsilon {epsilon:g} at "
                f"delta {delta:g}: {spent.epsilon(delta=delta):g} of it is spent."
            )
        high = min(2 * high, _MOST_STEPS)
    low = max(high // 2, _LEAST_STEPS - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / 1000


def _ideal_epsilon(rdp: tuple[float, ...], *, delta: float) -> float:
    """Canonne, Kamath and Steinke (2020), arXiv 2004.00010, proposition 12, over all orders.

    The same as Balle et al. (2020), arXiv 1905.09982, theorem 21.
    """
    if 0.0 in rdp:  # no divergence at one order: the results have one distribution
        return 0.0
    log_delta = math.log(delta)
    return max(
        0.0,
        min(
            value + math.log1p(-1 / order) - (log_delta + math.log(order)) / (order - 1)
            for order, value in zip(ORDERS, rdp, strict=True)
        ),
    )


@functools.cache
def _log_binomials(order: int) -> tuple[float, ...]:
    """Of k from 2 to ``order``."""
    return tuple(math.log(math.comb(order, k)) for k in range(2, order + 1))


@functools.lru_cache(maxsize=4096)
def _one_step(z: float, q: float) -> RenyiCurve:
    if q == 1:
        return RenyiCurve(rdp=tuple(min(order / (2 * z * z), _LARGEST) for order in ORDERS))
    log_q, log_rest = math.log(q), math.log1p(-q)
    # of k = 2, 3, ...: log q^k (exp((k^2 - k) / (2 z^2)) - 1)
    factors = [k * log_q + _log_expm1((k * k - k) / (2 * z * z)) for k in range(2, ORDERS[-1] + 1)]
    return RenyiCurve(rdp=tuple(_divergence(order, factors, log_rest) for order in ORDERS))


def _divergence(order: int, factors: list[float], log_rest: float) -> float:
    terms = [
        binomial + factor + (order - k) * log_rest
        for k, (binomial, factor) in enumerate(
            zip(_log_binomials(order), factors, strict=False), start=2
        )
    ]
    largest = max(terms)
    log_sum = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    # the logarithm of 1 + the sum, whichever of the two is larger
    log_moment = max(log_sum, 0.0) + math.log1p(math.exp(-abs(log_sum)))
    return min(log_moment / (order - 1), _LARGEST)


def _log_expm1(x: float) -> float:
    """``log(exp(x) - 1)``, for x > 0, small or large."""
    return math.log(math.expm1(x)) if x < 1 else x + math.log1p(-math.exp(-x))
