"""From a noised sum to the next theta, clip and metrics: post-processing, so it costs nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from carpool.config import RunConfig
from carpool_server.aggregation import blocks_of
from carpool_server.checkpoint import RunState
from carpool_server.optimizers import State, make_optimizer, rate_at
from carpool_server.privacy.clipping import grid_step
from carpool_server.privacy.mechanism import Mechanism, next_clip
from carpool_server.privacy.metrics import RoundMetrics, decode_metrics
from carpool_server.promise import metric_bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped:
    """What a round made of the state before it.

    Attributes:
        theta: float32, shape ``(num_values,)``; not checked yet.
        optimizer: the server optimiser's state.
        clip_norm: C of the next round.
        metrics: the devices' noised metrics, where the settings ask for them.
    """

    theta: NDArray[np.float32]
    optimizer: State
    clip_norm: float
    metrics: RoundMetrics | None


def step_with(
    noised: NDArray[np.int64], state: RunState, *, mechanism: Mechanism, config: RunConfig
) -> Stepped:
    """One server step.

    Args:
        noised: int64, the sum with its noise, in grid units, all blocks.
        state: before the round.
        mechanism: whose blocks the sum has.
        config: the run's settings.
    """
    number, clip_norm = state.info.round_number + 1, state.info.clip_norm
    blocks = blocks_of(noised, mechanism.sizes)
    # the denominator is fixed: it tells nothing about who was there
    unit = grid_step(clip_norm) / config.cohort.expected_size
    with np.errstate(over="ignore", invalid="ignore"):  # what comes out is looked at
        theta, optimizer = make_optimizer(config.server).step(
            state.theta,
            blocks["theta"].astype(np.float64) * unit,
            state.optimizer,
            rate=rate_at(number, rounds=config.rounds, config=config.server),
        )
    if config.privacy.adaptive_clip is not None:
        clip_norm = next_clip(
            clip_norm,
            noised_bits=int(blocks["norm_bit"][0]),
            config=config.privacy.adaptive_clip,
            expected_size=config.cohort.expected_size,
        )
    bounds, metrics = metric_bounds(config.privacy), None
    if bounds is not None:
        metrics = decode_metrics(
            blocks["metrics"], noise_multiplier=mechanism.multiplier("metrics"), bounds=bounds
        )
    return Stepped(theta=theta, optimizer=optimizer, clip_norm=clip_norm, metrics=metrics)
