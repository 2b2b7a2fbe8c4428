"""One round's contributions: who is asked, what is added, when the round may end."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from carpool.config import CohortConfig
from carpool.errors import ContributionRejected, MalformedMessage, Refusal, RoundFailed
from carpool.protocol import Contribution, RoundTask, TaskHeader
from carpool_server.aggregation import Total, validate_contribution
from carpool_server.exchange import TRAIN, Exchange, Reply

_RETRY_PAUSE_SECONDS = 1.0
_EXTRA_TTL_SECONDS = 60.0

_log = logging.getLogger(__name__)

Owners = Mapping[str, tuple[int, ...]]
"""Device id -> the aggregators that say they speak for it, sorted."""


@dataclasses.dataclass(kw_only=True)
class Gathered:
    """What a round brought.

    Attributes:
        total: the exact sum, and of how many.
        device_ids: whose updates are in it.
        refused: device id -> its aggregator's reason.
        rejected: one message per reply that was not added.
        loss_sum: of the devices' mean losses, where the task asked for it.
        extensions: deadlines that passed below the quorum.
        bytes_down, bytes_up: to and from the aggregators.
    """

    total: Total
    device_ids: set[str] = dataclasses.field(default_factory=set)
    refused: dict[str, Refusal] = dataclasses.field(default_factory=dict)
    rejected: list[str] = dataclasses.field(default_factory=list)
    loss_sum: float = 0.0
    extensions: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class Gathering:
    """Collects a cohort's updates, each device's at most once.

    The round ends when every drawn device is in the sum or refused; or at the deadline, or
    when nothing is outstanding any more, if the quorum is met. Below the quorum it is extended
    instead: the devices that are missing are asked for again (of the next aggregator that
    speaks for them, where there is one), and late replies of the round still count. After the
    last extension the round fails. Devices that add noise themselves (``task.participations``)
    are never asked twice in a round: new noise on the same examples would cost them again.

    Args:
        exchange: to the aggregators.
        task: the round's task with the whole cohort as its devices.
        theta: float32, shape ``(num_values,)``.
        owners: who speaks for whom; every device of the cohort is in it.
        rules: quorum, deadline, extensions.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        task: TaskHeader,
        theta: NDArray[np.float32],
        owners: Owners,
        rules: CohortConfig,
    ) -> None:
        self._exchange = exchange
        self._task = task
        self._theta = theta
        self._owners = owners
        self._rules = rules
        self._asked: dict[int, set[str]] = defaultdict(set)
        cohort = task.device_ids
        # against a product such as 0.7 * 10, which is a little more than 7
        self._needed = math.ceil(rules.quorum * len(cohort) - 1e-9)
        num_values = sum(task.blocks(theta.size).values())
        self.result = Gathered(total=Total(num_values=num_values, capacity=len(cohort)))

    def run(self) -> Gathered:
        """Asks, waits and adds until the round ends.

        Raises:
            RoundFailed: below the quorum after the last extension.
            RunStopped: the run was asked to stop.
        """
        try:
            for attempt in range(self._rules.extensions + 1):
                self.result.extensions = attempt
                if attempt:
                    self._exchange.pause(min(_RETRY_PAUSE_SECONDS, self._rules.deadline_seconds))
                if not attempt or self._task.participations is None:
                    self._ask(self._missing(), attempt)
                self._wait()
                if self.result.total.count >= self._needed:
                    return self.result
                if not self._missing():
                    break
        finally:
            self._exchange.abandon()
        raise RoundFailed(self._failure())

    def _missing(self) -> list[str]:
        done = self.result.device_ids | self.result.refused.keys()
        return [device for device in self._task.device_ids if device not in done]

    def _ask(self, devices: Iterable[str], attempt: int) -> None:
        parts: dict[int, list[str]] = defaultdict(list)
        for device in devices:
            owners = self._owners[device]
            parts[owners[attempt % len(owners)]].append(device)
        rules = self._rules
        ttl = rules.deadline_seconds * (rules.extensions + 1) + _EXTRA_TTL_SECONDS
        for node_id, part in sorted(parts.items()):
            header = self._task.model_copy(update={"device_ids": tuple(part)})
            wire = RoundTask(header=header, theta=self._theta).to_wire()
            self._asked[node_id].update(part)
            self.result.bytes_down += len(wire.header) + len(wire.body)
            self._exchange.ask(node_id, TRAIN, wire, group=str(self._task.round_number), ttl=ttl)

    def _wait(self) -> None:
        end = time.monotonic() + self._rules.deadline_seconds
        while self._missing():
            reply = self._exchange.next_reply(timeout=end - time.monotonic())
            if reply is None:
                return
            try:
                self._add(reply)
            except ContributionRejected as error:
                self.result.rejected.append(str(error))
                if self._task.report_loss:
                    _log.warning("round %d: %s", self._task.round_number, error)
                else:  # the message may name a device, and who is in a cohort is secret
                    _log.warning(
                        "round %d: aggregator %s: refused", self._task.round_number, error.sender
                    )

    def _add(self, reply: Reply) -> None:
        sender = str(reply.node_id)
        self.result.bytes_up += reply.bytes
        if reply.wire is None:
            raise ContributionRejected(f"expected a contribution, got {reply.error}", sender=sender)
        try:
            contribution = Contribution.from_wire(reply.wire)
        except MalformedMessage as error:
            raise ContributionRejected(str(error), sender=sender) from error
        header = contribution.header
        asked = tuple(sorted(self._asked[reply.node_id]))
        validate_contribution(
            contribution,
            task=self._task.model_copy(update={"device_ids": asked}),
            num_values=self._theta.size,
            sender=sender,
        )
        again = self.result.device_ids & set(header.device_ids)
        if again:
            raise ContributionRejected(
                f"expected devices that are not in the sum yet, got {min(again)!r} again.",
                sender=sender,
            )
        # everything is checked: from here on nothing can refuse
        self.result.total.add(contribution.total, count=header.count)
        self.result.device_ids.update(header.device_ids)
        for device in self.result.device_ids:
            self.result.refused.pop(device, None)
        for device, reason in header.refused.items():
            if device not in self.result.device_ids:
                self.result.refused[device] = reason
        self.result.loss_sum += header.loss_sum or 0.0

    def _failure(self) -> str:
        number, rules = self._task.round_number, self._rules
        message = (
            f"round {number}: expected updates of at least {rules.quorum:.0%} of the drawn "
            f"devices after {self.result.extensions} extensions of {rules.deadline_seconds:g} s, "
        )
        if self._task.report_loss:  # in a private mode these counts stay inside
            message += (
                f"got {self.result.total.count} of {len(self._task.device_ids)} "
                f"({len(self.result.refused)} refused, {len(self.result.rejected)} replies "
                f"rejected{', last: ' + self.result.rejected[-1] if self.result.rejected else ''})"
            )
        else:
            message += "got fewer"
        return f"{message}. Nothing was released; resume it with --resume."
