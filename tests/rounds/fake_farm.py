"""Aggregators whose devices need no model: each update is a hash of who, when and where."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from flwr.app import Message

from carpool.errors import Refusal
from carpool.protocol import Contribution, PoolHeader, RoundTask, TaskHeader
from carpool.theta import Layout, Segment
from carpool_server.aggregation import ContributionBuilder, DeviceFacts
from carpool_server.exchange import DESCRIBE, from_record, to_record

BUNDLE_ID = "b" * 64
DATA_ID = "d" * 64
LAYOUT = Layout(
    segments=(
        Segment(name="adapter.bias", group="adapter", shape=(7,), scale=0.5),
        Segment(name="head.core", group="head", shape=(4, 6), scale=1.0),
    )
)
NUM_VALUES = LAYOUT.num_values


def update_of(device_id: str, task: RoundTask) -> np.ndarray:
    """float32, shape ``(NUM_VALUES,)``: depends on device, round and theta; norms around 1."""
    seed = f"{device_id} {task.header.round_number}".encode()
    raw = np.frombuffer(hashlib.shake_256(seed).digest(4 * NUM_VALUES), dtype="<u4")
    values = (raw / 2**32 - 0.5).astype(np.float32)
    return values - np.float32(0.1) * task.theta


def contribution_to(task: RoundTask, *, refused: dict[str, Refusal] | None = None) -> Contribution:
    """The honest answer."""
    builder = ContributionBuilder(task.header, num_values=NUM_VALUES)
    for device in task.header.device_ids:
        if refused and device in refused:
            builder.refuse(device, refused[device])
        else:
            facts = DeviceFacts(num_examples=1, mean_loss=0.5, hit_at_1=0.25)
            builder.add(device, update_of(device, task), facts)
    return builder.build()


Lie = Callable[[Message, RoundTask], "Message | None"]


@dataclasses.dataclass
class FakeAggregator:
    """Answers as it should, or as ``lie`` does."""

    device_ids: tuple[str, ...]
    lie: Lie | None = None
    bundle_id: str = BUNDLE_ID
    layout_id: str = LAYOUT.id
    data_id: str | None = DATA_ID
    tasks: list[TaskHeader] = dataclasses.field(default_factory=list)

    def __call__(self, message: Message) -> Message | None:
        """Answers one message."""
        if message.metadata.message_type == DESCRIBE:
            pool = PoolHeader(
                bundle_id=self.bundle_id,
                layout_id=self.layout_id,
                data_id=self.data_id,
                device_ids=self.device_ids,
            )
            return Message(to_record(pool.to_wire()), reply_to=message)
        task = RoundTask.from_wire(from_record(message.content))
        self.tasks.append(task.header)
        if self.lie is not None:
            return self.lie(message, task)
        return answer(message, contribution_to(task))


def answer(message: Message, contribution: Contribution) -> Message:
    """A contribution as a reply."""
    return Message(to_record(contribution.to_wire()), reply_to=message)


def devices(count: int) -> tuple[str, ...]:
    """Names that no digit of another text contains by chance."""
    return tuple(f"dev-{n:03d}" for n in range(count))


def dealt(count: int, *, parts: int) -> list[tuple[str, ...]]:
    """Devices dealt out to aggregators."""
    names = devices(count)
    return [names[part::parts] for part in range(parts)]
