"""DP-SGD on the device: its noise is added before anything leaves, so nobody need be trusted.

Adversary: whoever sees the device's updates, the operator included. Unit: one example of one
device. Neighbouring: one example is added or removed; how many examples the device has is
taken as known. The steps are those of Abadi et al. (2016), arXiv 1607.00133, with examples
drawn independently. ``docs/device.md`` says what this does not hide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from carpool.errors import DeviceError, PrivacyError
from carpool.randomness import happens
from carpool.recipe import LocalRecipe
from carpool_device.batches import make_batch
from carpool_device.example_budget import ExampleBudget
from carpool_device.example_noise import SENSITIVITY_SLACK, with_noise
from carpool_device.runtime import DeviceProgram

_SMALLEST_CLIP, _LARGEST_CLIP = 1e-15, 1e15  # the program squares values in float32


class NoisyGradients:
    """The gradients of one participation, one a step.

    In each step every example is drawn by itself with probability q (coins of the system's
    source, right to 2**-64; never the order key's), the drawn ones' clipped gradients are
    added up, the sum is put on the grid, ``discrete_gaussian`` noise is added, and the result
    is divided by the recipe's batch size, which is the expected number and not the drawn one.
    No draw at all gives noise alone. Values of groups that are not trained get neither gradient
    nor noise. The clip is over all of theta all the same: what is trained is never
    longer, so the guarantee holds with something to spare.

    Attributes:
        spending: what all the steps cost.
    """

    def __init__(
        self,
        program: DeviceProgram,
        *,
        rows: Sequence[NDArray[np.int64]],
        labels: Sequence[int],
        recipe: LocalRecipe,
        trained: NDArray[np.bool_],
        budget: ExampleBudget | None,
        device_id: str,
    ) -> None:
        """Plans the noise.

        Args:
            program: whose gradients they are.
            rows: all examples' encoded queries.
            labels: their documents' places.
            recipe: with ``example_privacy``.
            trained: bool, shape ``(P,)``.
            budget: the device's, before this participation.
            device_id: named in errors.

        Raises:
            DeviceError: no budget was handed in, it is spent, or the recipe's clip cannot be.
        """
        if budget is None:
            raise DeviceError(
                f"device {device_id}: expected its ExampleBudget, which this recipe's "
                "example_privacy spends from, got None. Hand in what it has spent so far.",
                reason="recipe-not-supported",
            )
        if not _SMALLEST_CLIP <= recipe.l2_clip_norm <= _LARGEST_CLIP:
            raise DeviceError(
                f"device {device_id}: expected an example_clip_norm of {_SMALLEST_CLIP:g} to "
                f"{_LARGEST_CLIP:g} with example_privacy, got {recipe.l2_clip_norm}.",
                reason="recipe-not-supported",
            )
        try:
            self.spending = budget.charged(
                num_examples=len(rows), layout=program.bundle.manifest.layout, recipe=recipe
            )
        except PrivacyError as error:
            raise DeviceError(
                f"device {device_id}: {error}", reason="privacy-budget-spent"
            ) from error
        self._program, self._rows, self._labels = program, rows, labels
        self._recipe, self._trained = recipe, trained
        self._plan = self.spending.plan

    @property
    def num_steps(self) -> int:
        """The recipe's."""
        return self._plan.steps

    def at(self, theta: NDArray[np.float32]) -> tuple[None, NDArray[np.float32]]:
        """The next step's noised gradient at ``theta``: float32, shape ``(P,)``; no loss.

        Raises:
            DeviceError: the runtime failed.
        """
        places = drawn(len(self._rows), rate=self._plan.sampling_rate)
        total = clipped_sum(
            self._program,
            [self._rows[place] for place in places],
            [self._labels[place] for place in places],
            theta=theta,
            l2_clip_norm=self._recipe.l2_clip_norm,
        )
        noised = np.zeros(theta.size)
        noised[self._trained] = with_noise(
            total[self._trained],
            noise_multiplier=self._plan.noise_multiplier,
            clip_norm=_as_the_program_gets_it(self._recipe.l2_clip_norm),
        )
        with np.errstate(over="ignore"):  # the caller looks at what comes out
            return None, (noised / self._recipe.batch_size).astype(np.float32)


def drawn(count: int, *, rate: float) -> list[int]:
    """The places that a step draws of ``count``, in order: each by itself, with ``rate``.

    Guarantees: every place's probability is floor(rate * 2**64) / 2**64, independent of all
    else; the coins come from ``os.urandom`` and are kept nowhere.
    """
    coins = _system_words(count)
    return [place for place in range(count) if happens(rate, coins)]


def clipped_sum(
    program: DeviceProgram,
    rows: Sequence[NDArray[np.int64]],
    labels: Sequence[int],
    *,
    theta: NDArray[np.float32],
    l2_clip_norm: float,
) -> NDArray[np.float64]:
    """The examples' gradients, each clipped by the program, added up.

    Chunks of as many examples as the program takes, in order, each example with weight 1; the
    chunks' sums (float32) are added in float64. Where a chunk's sum is not finite, or longer than
    its examples' clips and the slack allow, its examples are taken one by one, and one of which
    that is still true adds nothing: to refuse would tell the world that there is such an example.

    Args:
        program: whose gradients they are.
        rows: any number of encoded queries, none included.
        labels: their documents' places.
        theta: float32, shape ``(P,)``.
        l2_clip_norm: C.

    Returns:
        float64, shape ``(P,)``, finite.

    Raises:
        DeviceError: the runtime failed.
    """
    total = np.zeros(theta.size)
    most = _as_the_program_gets_it(l2_clip_norm) * (1 + SENSITIVITY_SLACK)

    def add(places: range) -> bool:
        batch = make_batch(
            program.tokenizer,
            [rows[place] for place in places],
            [labels[place] for place in places],
            weight=1.0,
        )
        _, gradient = program.gradients(theta, batch, l2_clip_norm=l2_clip_norm)
        wide = gradient.astype(np.float64)
        fits = bool(np.linalg.norm(wide) <= len(places) * most)  # false for NaN
        if fits:
            np.add(total, wide, out=total)
        return fits

    for start in range(0, len(rows), program.max_batch):
        chunk = range(start, min(start + program.max_batch, len(rows)))
        if not add(chunk):
            for place in chunk:
                add(range(place, place + 1))
    return total


def _as_the_program_gets_it(l2_clip_norm: float) -> float:
    return float(np.float32(l2_clip_norm))


def _system_words(count: int) -> Iterator[int]:
    """Uniform 64-bit words of the operating system's cryptographic source."""
    return (int.from_bytes(os.urandom(8), "big") for _ in range(count))
