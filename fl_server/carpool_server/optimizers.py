"""Server optimisers: how a round's mean update moves theta.

State is float64 and theta float32, so a checkpoint holds exactly what the next step needs.
Everything is element-wise IEEE arithmetic: equal inputs give equal bits on every machine.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from carpool.config import AdamConfig, ServerConfig, SgdConfig

Float64 = NDArray[np.float64]
State = dict[str, Float64]
"""Named float64 arrays, each of shape ``(num_values,)``: what a checkpoint keeps."""


class ServerOptimizer(Protocol):
    """A rule that turns a mean update into a new theta. It keeps nothing itself."""

    def init(self, num_values: int) -> State:
        """The state before the first round."""

    def step(
        self, theta: NDArray[np.float32], mean: Float64, state: State, *, rate: float
    ) -> tuple[NDArray[np.float32], State]:
        """One step; changes none of its arguments.

        Args:
            theta: float32, shape ``(num_values,)``.
            mean: float64, same shape: the round's (noised) sum over the expected cohort, in
                theta's units. It points where devices moved to, so it is added.
            state: from ``init`` or the step before.
            rate: the round's learning rate.

        Returns:
            The new theta (float32, rounded once) and the new state.
        """


class Sgd:
    """``v = momentum * v + mean; theta += rate * v`` (FedAvg where both are 0 and 1)."""

    def __init__(self, *, momentum: float) -> None:
        self._momentum = momentum

    def init(self, num_values: int) -> State:
        """Zero velocity."""
        return {"velocity": np.zeros(num_values)}

    def step(
        self, theta: NDArray[np.float32], mean: Float64, state: State, *, rate: float
    ) -> tuple[NDArray[np.float32], State]:
        """One step, as ``ServerOptimizer`` says."""
        velocity = self._momentum * state["velocity"] + mean
        return _moved(theta, rate * velocity), {"velocity": velocity}


class Adam:
    """FedAdam as published: no bias correction, second moment starting at ``tau**2``.

    ``m = beta1 * m + (1 - beta1) * mean; v = beta2 * v + (1 - beta2) * mean**2;
    theta += rate * m / (sqrt(v) + tau)``

    With 0.9 and 0.99 the first step is that of bias-corrected Adam, since 1 - beta1 equals
    sqrt(1 - beta2), and later ones are up to about twice as long.

    Source: Reddi et al. (2021), algorithm 2, https://arxiv.org/abs/2003.00295.
    """

    def __init__(self, *, beta1: float, beta2: float, tau: float) -> None:
        self._beta1, self._beta2, self._tau = beta1, beta2, tau

    def init(self, num_values: int) -> State:
        """First moment 0, second ``tau**2`` (the least the paper allows)."""
        return {"first": np.zeros(num_values), "second": np.full(num_values, self._tau**2)}

    def step(
        self, theta: NDArray[np.float32], mean: Float64, state: State, *, rate: float
    ) -> tuple[NDArray[np.float32], State]:
        """One step, as ``ServerOptimizer`` says."""
        first = self._beta1 * state["first"] + (1 - self._beta1) * mean
        second = self._beta2 * state["second"] + (1 - self._beta2) * np.square(mean)
        moved = _moved(theta, rate * first / (np.sqrt(second) + self._tau))
        return moved, {"first": first, "second": second}


def make_optimizer(config: ServerConfig) -> ServerOptimizer:
    """The optimiser that the settings name."""
    match config:
        case SgdConfig():
            return Sgd(momentum=config.momentum)
        case AdamConfig():
            return Adam(beta1=config.beta1, beta2=config.beta2, tau=config.tau)


def rate_at(round_number: int, *, rounds: int, config: ServerConfig) -> float:
    """The round's learning rate: full for ``hold`` of the rounds, then linearly toward 0.

    The rate would reach 0 in the round after the last one, so no round is wasted.

    Args:
        round_number: 1 to ``rounds``.
        rounds: of the whole run.
        config: has ``learning_rate`` and ``hold``.
    """
    held = config.hold * rounds
    if round_number <= held:
        return config.learning_rate
    return config.learning_rate * (rounds + 1 - round_number) / (rounds + 1 - held)


def _moved(theta: NDArray[np.float32], change: Float64) -> NDArray[np.float32]:
    return (theta.astype(np.float64) + change).astype(np.float32)
