"""From devices' updates to one contribution: what every aggregator does, wherever they come from.

A device is in the sum at most once, clipped; everything that it adds lies on the grid.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from carpool.errors import Refusal, UpdateRejected
from carpool.protocol import GRID_BOUND, Contribution, ContributionHeader, TaskHeader
from carpool_server.aggregation.total import Total, blocks_of
from carpool_server.privacy.clipping import clip_onto
from carpool_server.privacy.metrics import encode_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device says beside its update; told where the task asks for it, else dropped.

    Attributes:
        num_examples: trained on.
        mean_loss: of its training, in nats.
        hit_at_1: share of its examples whose document came first, before training.
    """

    num_examples: int = 0
    mean_loss: float = math.nan
    hit_at_1: float = math.nan


class ContributionBuilder:
    """Adds up the updates that a task asks for.

    Guarantees: each asked device is in the sum at most once, whatever is added how often; its
    share of every block of the sum is at most ``GRID_BOUND`` long, exactly; a device that is
    refused adds nothing.

    Args:
        task: what is asked, of whom.
        num_values: theta's length.
    """

    def __init__(self, task: TaskHeader, *, num_values: int) -> None:
        self._task = task
        self._sizes = task.blocks(num_values)
        self._asked = frozenset(task.device_ids)
        self._total = Total(num_values=sum(self._sizes.values()), capacity=len(self._asked))
        self._devices: set[str] = set()
        self._refused: dict[str, Refusal] = {}
        self._num_examples, self._losses = 0, list[float]()

    def add(self, device_id: str, update: NDArray[np.float32], facts: DeviceFacts) -> None:
        """Clips a device's update and adds it, with its norm's bit and its metrics if asked.

        Args:
            device_id: one that the task asks, and that is not in the sum yet.
            update: float32, shape ``(num_values,)``.
            facts: what else it says.

        Raises:
            UpdateRejected: the device was not asked or is in the sum already, or the update
                has another length or a value that is not finite. Nothing was added.
        """
        if device_id not in self._asked:
            raise UpdateRejected(
                "expected a device that the task asks, got another one.",
                device_id=device_id,
                reason="not-asked",
            )
        if device_id in self._devices:
            raise UpdateRejected(
                "expected one update, got another one.", device_id=device_id, reason="repeated"
            )
        if update.shape != (self._sizes["theta"],):
            raise UpdateRejected(
                f"expected {self._sizes['theta']} values, got shape {update.shape}.",
                device_id=device_id,
                reason="wrong-length",
            )
        self._total.make_room(1)
        parts = blocks_of(self._total.values, self._sizes)
        norm = clip_onto(
            parts["theta"], update, clip_norm=self._task.clip_norm, device_id=device_id
        )
        # from here on nothing can refuse: what is added is all of a device or nothing
        if self._task.norm_bit:
            # the bit minus one half, in units of half the bound: 1/2 is its sensitivity
            parts["norm_bit"] += GRID_BOUND if norm <= self._task.clip_norm else -GRID_BOUND
        if self._task.metrics is not None:
            parts["metrics"] += encode_metrics(
                loss=facts.mean_loss,
                hit_at_1=facts.hit_at_1,
                examples=facts.num_examples,
                bounds=self._task.metrics,
            )
        self._total.count += 1
        self._devices.add(device_id)
        self._refused.pop(device_id, None)
        self._num_examples += facts.num_examples
        self._losses.append(facts.mean_loss)

    def refuse(self, device_id: str, reason: Refusal) -> None:
        """Says why a device's update is not in, unless it is."""
        if device_id not in self._devices:
            self._refused[device_id] = reason

    def build(self) -> Contribution:
        """The contribution so far."""
        task = self._task
        return Contribution(
            header=ContributionHeader(
                run_id=task.run_id,
                round_number=task.round_number,
                bundle_id=task.bundle_id,
                layout_id=task.layout_id,
                device_ids=tuple(sorted(self._devices)),
                count=self._total.count,
                refused=self._refused,
                num_examples=self._num_examples if task.report_loss else None,
                loss_sum=math.fsum(self._losses) if task.report_loss else None,
            ),
            total=self._total.values,
        )
