"""Devices that are easy to see: an aggregator whose updates are canaries."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from carpool.protocol import Contribution, PoolHeader, RoundTask
from carpool.schema import canonical_id
from carpool.theta import Layout, Segment
from carpool_server.aggregation import ContributionBuilder, DeviceFacts
from carpool_server.exchange import DESCRIBE, from_record, to_record

LENGTH = 10.0
"""A canary's update over the clip: one that is not clipped is seen at once."""

BUNDLE_ID = canonical_id({"purpose": "carpool/1/audit"})
"""There is no program: canaries do not train."""


class Canaries:
    """Devices with one of theta's values each; every one is in or out by a fair coin.

    The coins come from the system's cryptographic source and are made once.

    Attributes:
        layout: a theta of a value per canary.
        device_ids: in theta's order.
        coins: bool, shape ``(count,)``: which are in.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.layout = Layout(
            segments=(Segment(name="canaries", group="head", shape=(count,), scale=1.0),)
        )
        self.device_ids = tuple(f"canary-{n:06d}" for n in range(count))
        bits = np.frombuffer(secrets.token_bytes(count), dtype=np.uint8) & 1
        self.coins: NDArray[np.bool_] = bits.astype(np.bool_)
        self._place = {device: n for n, device in enumerate(self.device_ids)}

    def contribute(self, task: RoundTask) -> Contribution:
        """What the task's canaries add up to, through the code of every aggregator.

        One that is in adds ``LENGTH`` times the round's clip in its own direction, and the
        largest numbers beside it. One that is out is its neighbour: it takes part and what it
        adds is zero, in all blocks.
        """
        asked = task.header.device_ids
        present = [device for device in asked if self.coins[self._place[device]]]
        absent = sorted(set(asked).difference(present))
        bounds = task.header.metrics
        facts = DeviceFacts(
            num_examples=1 if bounds is None else bounds.max_examples,
            mean_loss=1.0 if bounds is None else bounds.max_loss,
            hit_at_1=1.0,
        )
        builder = ContributionBuilder(task.header, num_values=task.theta.size)
        update = np.zeros(task.theta.size, dtype=np.float32)
        for device in present:
            place = self._place[device]
            update[place] = LENGTH * task.header.clip_norm
            builder.add(device, update, facts)
            update[place] = 0
        contribution = builder.build()

        bare = task.header.model_copy(update={"norm_bit": False, "metrics": None})
        zeros = ContributionBuilder(bare, num_values=task.theta.size)
        for device in absent:
            zeros.add(device, update, facts)
        contribution.total[: task.theta.size] += zeros.build().total
        header = contribution.header.model_copy(
            update={"device_ids": tuple(sorted(asked)), "count": len(asked)}
        )
        return Contribution(header=header, total=contribution.total)


class CanaryAggregator:
    """Answers for some of the canaries.

    Args:
        canaries: all of them.
        device_ids: those it speaks for.
    """

    def __init__(self, canaries: Canaries, device_ids: Iterable[str]) -> None:
        self._canaries = canaries
        self._pool = PoolHeader(
            bundle_id=BUNDLE_ID,
            layout_id=canaries.layout.id,
            device_ids=tuple(device_ids),
        )

    def __call__(self, message: Message) -> Message:
        """Answers one message of the coordinator's."""
        if message.metadata.message_type == DESCRIBE:
            return Message(to_record(self._pool.to_wire()), reply_to=message)
        task = RoundTask.from_wire(from_record(message.content))
        contribution = self._canaries.contribute(task)
        return Message(to_record(contribution.to_wire()), reply_to=message)
