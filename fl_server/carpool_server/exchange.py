"""Messages over Flower's ``Grid``: asked one by one, awaited together, none can block the rest."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from carpool.errors import MalformedMessage, RunStopped
from carpool.protocol import Wire

DESCRIBE = "query.describe"
"""Flower message type: which devices do you speak for? Answered with a ``PoolHeader``."""

TRAIN = "train"
"""Flower message type: a ``RoundTask``, answered with a ``Contribution``."""

_RECORD = "carpool"
_FIRST_WAIT = 0.02
_LONGEST_WAIT = 0.2
_STOP_CHECK = 0.5

_log = logging.getLogger(__name__)


def to_record(wire: Wire) -> RecordDict:
    """A message's content as Flower carries it."""
    return RecordDict({_RECORD: ConfigRecord({"header": wire.header, "body": wire.body})})


def from_record(content: RecordDict) -> Wire:
    """What ``to_record`` packed.

    Raises:
        MalformedMessage: the content has another form.
    """
    record = content.get(_RECORD)
    if isinstance(record, ConfigRecord):
        header, body = record.get("header"), record.get("body")
        if isinstance(header, bytes) and isinstance(body, bytes):
            return Wire(header, body)
    raise MalformedMessage(
        f"expected a record {_RECORD!r} with header and body as bytes, got {sorted(content)}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back: a wire, or why there is none.

    Attributes:
        node_id: who was asked.
        wire: the content.
        error: Flower's error, or what is wrong with the content.
        bytes: of header and body.
    """

    node_id: int
    wire: Wire | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        """On the wire, without Flower's envelope."""
        return 0 if self.wire is None else len(self.wire.header) + len(self.wire.body)


class Exchange:
    """Asks aggregators and hands over their replies in the order they come.

    Messages are sent one after the other, and every one is awaited in a thread of its own: a
    reply whose upload broke off blocks Flower's pull until its session dies (180 s in flwr
    1.41), which must not keep back the others.

    Args:
        grid: Flower's.
        stop: once it is set, waiting raises ``RunStopped``.
    """

    def __init__(self, grid: Grid, *, stop: threading.Event) -> None:
        self._grid = grid
        self._stop = stop
        self._replies: queue.SimpleQueue[tuple[threading.Event, Reply]] = queue.SimpleQueue()
        self._abandoned = threading.Event()
        self._sending = threading.Lock()  # sending several at once is not promised by Flower
        self.outstanding = 0

    def node_ids(self) -> list[int]:
        """The connected aggregators, sorted."""
        return sorted(self._grid.get_node_ids())

    def ask(self, node_id: int, message_type: str, wire: Wire, *, group: str, ttl: float) -> None:
        """Sends one message; its reply or its failure comes out of ``next_reply``.

        Args:
            node_id: whom.
            message_type: ``DESCRIBE`` or ``TRAIN``.
            wire: the content.
            group: Flower's group id; a round's number.
            ttl: seconds that message and reply are worth keeping.
        """
        self.outstanding += 1
        message = Message(
            to_record(wire),
            dst_node_id=node_id,
            message_type=message_type,
            ttl=ttl,
            group_id=group,
        )
        thread = threading.Thread(
            target=self._deliver,
            args=(message, node_id, self._abandoned),
            name=f"carpool-reply-{node_id}",
            daemon=True,  # a blocked pull must not keep the process alive
        )
        thread.start()

    def next_reply(self, *, timeout: float) -> Reply | None:
        """The next reply, or None after ``timeout`` seconds or when nothing is outstanding.

        Raises:
            RunStopped: the run was asked to stop.
        """
        end = time.monotonic() + timeout
        while self.outstanding:
            if self._stop.is_set():
                raise RunStopped("stopped as asked; resume it with --resume.")
            left = end - time.monotonic()
            if left <= 0:
                return None
            try:
                group, reply = self._replies.get(timeout=min(left, _STOP_CHECK))
            except queue.Empty:
                continue
            if group is self._abandoned:  # else it answers what nobody waits for any more
                self.outstanding -= 1
                return reply
        return None

    def pause(self, seconds: float) -> None:
        """Waits.

        Raises:
            RunStopped: the run was asked to stop.
        """
        if self._stop.wait(seconds):
            raise RunStopped("stopped as asked; resume it with --resume.")

    def abandon(self) -> None:
        """Gives up on everything outstanding: its replies, whenever they come, are ignored."""
        self._abandoned.set()
        self._abandoned = threading.Event()
        self.outstanding = 0

    def _deliver(self, message: Message, node_id: int, abandoned: threading.Event) -> None:
        reply = self._exchanged(message, node_id, abandoned)
        if reply is not None:
            self._replies.put((abandoned, reply))

    def _exchanged(
        self, message: Message, node_id: int, abandoned: threading.Event
    ) -> Reply | None:
        try:
            with self._sending:
                pushed = self._grid.push_messages([message])
            message_ids = [message_id for message_id in pushed if message_id]
        except Exception as error:  # noqa: BLE001  any transport's error is a failed ask
            return Reply(node_id=node_id, error=f"the message could not be sent: {error}")
        if not message_ids:
            return Reply(node_id=node_id, error="the message was not accepted for sending.")
        wait = _FIRST_WAIT
        while not (abandoned.is_set() or self._stop.is_set()):
            try:
                for answer in self._grid.pull_messages(message_ids):
                    return _read(answer, node_id)
            except Exception as error:  # noqa: BLE001  any transport's error costs a retry
                _log.warning("aggregator %s: pulling its reply failed: %s", node_id, error)
            abandoned.wait(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT)
        return None


def _read(answer: Message, node_id: int) -> Reply:
    if answer.has_error():
        reason = answer.error.reason or "no reason given"
        return Reply(node_id=node_id, error=f"error {answer.error.code}: {reason}")
    try:
        return Reply(node_id=node_id, wire=from_record(answer.content))
    except MalformedMessage as error:
        return Reply(node_id=node_id, error=str(error))
