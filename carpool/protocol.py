"""What the coordinator and an aggregator say to each other, as bytes.

Once, an aggregator says which devices it speaks for. Then, in every round, a task goes out and
a contribution comes back. All are idempotent: the same task gives the same
contribution, so a lost reply may simply be asked for again. On the wire each is a header
(canonical JSON) and one binary body (little-endian), which any transport can carry.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from carpool.errors import MalformedMessage, Refusal
from carpool.privacy import MetricBounds
from carpool.recipe import LocalRecipe
from carpool.schema import Model, Sha256, canonical_bytes, describe

PROTOCOL_VERSION: Literal[1] = 1

GRID_BITS = 30
"""Updates live on an integer grid of step ``clip_norm * 2**-GRID_BITS``."""

GRID_BOUND = 1 << GRID_BITS
"""The L2 bound on one device's share of each block of a sum, in grid units."""

METRIC_NAMES = ("contributors", "loss", "hit_at_1", "examples")
"""The metrics' coordinates, in order."""


Block = Literal["theta", "norm_bit", "metrics"]
"""A part of the sum with a bound and a noise of its own."""


def block_sizes(
    num_values: int, *, norm_bit: bool, metrics: MetricBounds | None
) -> dict[Block, int]:
    """A sum's blocks in order, and how many integers each has.

    One device's share of each is at most ``GRID_BOUND`` long (L2).
    """
    sizes: dict[Block, int] = {"theta": num_values}
    if norm_bit:
        sizes["norm_bit"] = 1
    if metrics is not None:
        sizes["metrics"] = len(METRIC_NAMES)
    return sizes


@dataclasses.dataclass(frozen=True)
class Wire:
    """A message as a transport carries it."""

    header: bytes
    body: bytes


class PoolHeader(Model):
    """Which devices an aggregator speaks for. On the wire its body is empty.

    Attributes:
        bundle_id, layout_id: what the aggregator has installed.
        data_id: SHA-256 of a simulation's data set, so that a run is resumed with its own;
            None where devices hold their own text.
        device_ids: distinct.
    """

    version: Literal[1] = PROTOCOL_VERSION
    bundle_id: Sha256
    layout_id: Sha256
    data_id: Sha256 | None = None
    device_ids: tuple[str, ...]

    def to_wire(self) -> Wire:
        """As bytes."""
        return Wire(_header_bytes(self), b"")

    @classmethod
    def from_wire(cls, wire: Wire) -> PoolHeader:
        """Reads what ``to_wire`` wrote.

        Raises:
            MalformedMessage: another version, or a mistake in the header.
        """
        return _parse(PoolHeader, wire.header)


class TaskHeader(Model):
    """What an aggregator is asked to do in a round.

    Attributes:
        run_id: one federated run.
        round_number: 1 or more.
        bundle_id, layout_id: what theta belongs to.
        recipe: what each device does.
        order_key: hexadecimal key of the devices' order of examples.
        clip_norm: C, the joint L2 bound on an update, in theta's units.
        device_ids: whose updates are wanted: those of the cohort that this aggregator speaks
            for, sorted.
        report_loss: whether the devices' training loss may be told (mode ``none`` alone).
        norm_bit: whether each device adds one coordinate: whether its norm is within the clip.
        metrics: whether each device adds ``METRIC_NAMES``, and their bounds.
        participations: device id -> in how many rounds it was asked before this one, where
            devices add noise themselves; None elsewhere.
    """

    version: Literal[1] = PROTOCOL_VERSION
    run_id: str
    round_number: Annotated[int, Field(ge=1)]
    bundle_id: Sha256
    layout_id: Sha256
    recipe: LocalRecipe
    order_key: str
    clip_norm: Annotated[float, Field(gt=0)]
    device_ids: tuple[str, ...]
    report_loss: bool
    norm_bit: bool
    metrics: MetricBounds | None
    participations: dict[str, Annotated[int, Field(ge=0)]] | None

    def blocks(self, num_values: int) -> dict[Block, int]:
        """The sum's blocks in order (``block_sizes``), for a theta of ``num_values``."""
        return block_sizes(num_values, norm_bit=self.norm_bit, metrics=self.metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundTask:
    """A header and theta: float32, shape ``(num_values,)``."""

    header: TaskHeader
    theta: NDArray[np.float32]

    def to_wire(self) -> Wire:
        """As bytes; theta little-endian."""
        return Wire(_header_bytes(self.header), self.theta.astype("<f4").tobytes())

    @classmethod
    def from_wire(cls, wire: Wire) -> RoundTask:
        """Reads what ``to_wire`` wrote.

        Raises:
            MalformedMessage: another version, a mistake in the header, or a body that is not
                whole float32 values.
        """
        header = _parse(TaskHeader, wire.header)
        return cls(header=header, theta=_values(wire.body, "<f4", np.float32))


class ContributionHeader(Model):
    """Who is in a contribution.

    Attributes:
        run_id, round_number, bundle_id, layout_id: the task's.
        device_ids: whose updates are in the sum, sorted.
        count: how many; the sum's bound follows from it.
        refused: device id -> why its update is not in; a word of a fixed list, because a message
            could quote private text.
        num_examples: used by the devices in all; only where the task asked for the loss.
        loss_sum: of the devices' mean losses; only where the task asked for the loss.
    """

    version: Literal[1] = PROTOCOL_VERSION
    run_id: str
    round_number: Annotated[int, Field(ge=1)]
    bundle_id: Sha256
    layout_id: Sha256
    device_ids: tuple[str, ...]
    count: int
    refused: dict[str, Refusal]
    num_examples: Annotated[int, Field(ge=0)] | None = None
    loss_sum: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contribution:
    """The integer sum of devices' clipped updates, in grid units.

    ``total`` is int64, theta's values first, then what else the task asks of each device
    (``TaskHeader.blocks``).
    """

    header: ContributionHeader
    total: NDArray[np.int64]

    def to_wire(self) -> Wire:
        """As bytes; the sum little-endian."""
        return Wire(_header_bytes(self.header), self.total.astype("<i8").tobytes())

    @classmethod
    def from_wire(cls, wire: Wire) -> Contribution:
        """Reads what ``to_wire`` wrote; whether it fits the round is not checked here.

        Raises:
            MalformedMessage: another version, a mistake in the header, or a body that is not
                whole int64 values.
        """
        header = _parse(ContributionHeader, wire.header)
        return cls(header=header, total=_values(wire.body, "<i8", np.int64))


_Header = TypeVar("_Header", PoolHeader, TaskHeader, ContributionHeader)
_Scalar = TypeVar("_Scalar", np.float32, np.int64)


def _header_bytes(header: Model) -> bytes:
    return canonical_bytes(header.model_dump(mode="json"))


def _parse(kind: type[_Header], raw: bytes) -> _Header:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise MalformedMessage(f"{kind.__name__}: {describe(error, kind)}") from error


def _values(body: bytes, wire_type: str, dtype: type[_Scalar]) -> NDArray[_Scalar]:
    width = np.dtype(wire_type).itemsize
    if len(body) % width:
        raise MalformedMessage(
            f"expected whole values of {width} bytes ({wire_type}), got {len(body)} bytes."
        )
    return np.frombuffer(body, dtype=wire_type).astype(dtype)
