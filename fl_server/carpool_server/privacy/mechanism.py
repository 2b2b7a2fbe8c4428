"""What is added to a round's sum: one Gaussian mechanism over blocks with their own noise.

A device's share of block b is at most 1 long in the block's own unit (the grid's bound), and
the noise has z_b times that unit. Divided by their noise, all blocks together are one vector
with a norm of at most ``sqrt(sum(1 / z_b**2))`` under noise of 1: a Gaussian mechanism with
``1 / z**2 = sum(1 / z_b**2)``. The sources: Andrew et al. (2021), arXiv 1905.03871, theorem 1,
for the bit; McMahan et al. (2018b), arXiv 1812.06210, for vectors of several parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from carpool.errors import PrivacyError
from carpool.privacy import LARGEST_CLIP, SMALLEST_CLIP, AdaptiveClip, PrivacyConfig
from carpool.protocol import GRID_BOUND, Block
from carpool_server.privacy.noise import gaussian_on_grid, noise_scale

_LARGEST_BIT_SHARE = 0.1
"""Of ``1 / z**2``, that norm bits take where the settings do not say how noisy they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The noise of one release.

    Attributes:
        sizes: block -> how many integers it has, in the sum's order.
        scales: block -> standard deviation of its noise, in grid units; all 0 without noise.
    """

    sizes: Mapping[Block, int]
    scales: Mapping[Block, int]

    @property
    def num_values(self) -> int:
        """How many integers get noise."""
        return sum(self.sizes.values())

    @property
    def noise_multiplier(self) -> float:
        """Z of all blocks together: what the release costs; 0 without noise."""
        if not all(self.scales.values()):
            return 0.0
        return 1 / math.sqrt(math.fsum(self.multiplier(block) ** -2 for block in self.sizes))

    def multiplier(self, block: Block) -> float:
        """A block's noise over its bound."""
        return self.scales[block] / GRID_BOUND

    def noise(self) -> NDArray[np.int64]:
        """One draw for the whole sum, int64 in grid units.

        Guarantees: as ``gaussian_on_grid``, for every block; the release is the Gaussian
        mechanism with noise multiplier ``noise_multiplier``.
        """
        return np.concatenate(
            [gaussian_on_grid(size, scale=self.scales[b]) for b, size in self.sizes.items()]
        )


def mechanism_for(
    config: PrivacyConfig,
    *,
    noise_multiplier: float,
    sizes: Mapping[Block, int],
    expected_size: float,
) -> Mechanism:
    """Shares a noise multiplier out over the blocks.

    Guarantees: in mode ``central`` the mechanism's own ``noise_multiplier`` is the one given,
    or larger by a rounding to whole grid units.
    In ``projection`` every block's noise is that of the imagined cohort, smaller by this
    cohort over that one, and nothing is guaranteed. In the other modes there is no noise.

    Args:
        config: what to promise.
        noise_multiplier: z of one release.
        sizes: of the sum's blocks.
        expected_size: of this run's cohort.

    Raises:
        PrivacyError: bits and metrics together would take all of the budget, so that theta
            would need infinite noise.
    """
    if noise_multiplier == 0:
        return Mechanism(sizes=sizes, scales=dict.fromkeys(sizes, 0))
    cohort = expected_size if config.projection is None else config.projection.cohort
    costs: dict[Block, float] = {}
    if "norm_bit" in sizes and config.adaptive_clip is not None:
        # its bound is 1/2, so noise of s bits is a multiplier of 2 s
        noise = bit_noise(config.adaptive_clip, cohort, noise_multiplier=noise_multiplier)
        costs["norm_bit"] = (2 * noise) ** -2
    if "metrics" in sizes and config.metrics is not None:
        costs["metrics"] = config.metrics.budget_share * noise_multiplier**-2
    left = noise_multiplier**-2 - sum(costs.values())
    if left <= 0:
        raise PrivacyError(
            f"privacy: norm bit and metrics would cost as much as a noise multiplier of "
            f"{sum(costs.values()) ** -0.5:.3g} does, and all is {noise_multiplier:.3g}: nothing "
            "is left for theta. Raise adaptive_clip.bit_noise or lower metrics.budget_share."
        )
    costs["theta"] = left
    shrink = expected_size / cohort
    return Mechanism(
        sizes=sizes,
        scales={block: noise_scale(shrink * costs[block] ** -0.5) for block in sizes},
    )


def bit_noise(config: AdaptiveClip, cohort: float, *, noise_multiplier: float) -> float:
    """Standard deviation of the noise on the sum of bits.

    Where the settings leave it open: a twentieth of the cohort, as the source has it, or more
    where a small cohort's bits would otherwise take over a tenth of the budget.

    Args:
        config: the settings.
        cohort: expected devices.
        noise_multiplier: z of the whole release.

    Source: Andrew et al. (2021), arXiv 1905.03871, section 3.
    """
    if config.bit_noise is not None:
        return config.bit_noise
    return max(cohort / 20, noise_multiplier / (2 * math.sqrt(_LARGEST_BIT_SHARE)))


def next_clip(
    clip_norm: float, *, noised_bits: int, config: AdaptiveClip, expected_size: float
) -> float:
    """The clip after a round: up where too few updates were within it, down where too many.

    ``C * exp(-rate * (share - target))``, where share is 1/2 plus the noised sum of (bit - 1/2)
    over the expected cohort. Post-processing of what was noised, so it costs nothing more.

    Args:
        clip_norm: C of the round.
        noised_bits: the block's noised sum, in grid units (the bound is one half).
        config: target and rate.
        expected_size: the fixed denominator.

    Source: Andrew et al. (2021), arXiv 1905.03871, algorithm 1.
    """
    share = 0.5 + noised_bits / (2 * GRID_BOUND) / expected_size
    # missing replies and noise can push the share beyond what a share can be
    share = min(max(share, 0.0), 1.0)
    moved = clip_norm * math.exp(-config.learning_rate * (share - config.target_quantile))
    return min(max(moved, SMALLEST_CLIP), LARGEST_CLIP)
