"""Flower's ``Grid`` in one process: every message is answered by a function, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from carpool_server.private import Run, pose_as_a_task

_UNKNOWN = 0  # Flower's code of an error that has no other

Respond = Callable[[Message], Message | None]
"""Answers a message; None never answers."""


class LocalGrid(Grid):
    """Delivers messages to ``nodes`` and keeps their replies until they are pulled once.

    A node that fails answers with Flower's error, as it would elsewhere.

    Attributes:
        nodes: node id -> what answers there.
        pushed: all messages so far.
    """

    def __init__(self, nodes: dict[int, Respond]) -> None:
        pose_as_a_task()
        self.nodes = nodes
        self.pushed: list[Message] = []
        self._lock = threading.Lock()
        self._replies: dict[str, Message] = {}
        self._count = 0

    def get_node_ids(self) -> Iterable[int]:
        """All of them."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Starts one thread per message."""
        ids = []
        for message in messages:
            with self._lock:
                self._count += 1
                message_id = str(self._count)
                self.pushed.append(message)
            ids.append(message_id)
            threading.Thread(target=self._answer, args=(message_id, message), daemon=True).start()
        return ids

    def _answer(self, message_id: str, message: Message) -> None:
        try:
            reply = self.nodes[message.metadata.dst_node_id](message)
        except Exception as error:  # noqa: BLE001  a node's failure is its answer
            reply = Message(Error(_UNKNOWN, repr(error)), reply_to=message)
        if reply is not None:
            with self._lock:
                self._replies[message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What is there, once."""
        with self._lock:
            found = [self._replies.pop(i, None) for i in message_ids]
        return [reply for reply in found if reply is not None]

    def set_run(self, run: Run) -> None:
        """Is not used here."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Is not used here."""
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Is not used here."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], **kwargs: object) -> Iterable[Message]:
        """Is not used here."""
        raise NotImplementedError


def app_nodes(
    app: ClientApp, *, parts: int, run_config: UserConfig | None = None
) -> dict[int, Respond]:
    """Nodes that run a real ``ClientApp``, each as its own partition, one message at a time."""
    lock = threading.Lock()

    def node(part: int) -> Respond:
        context = Context(
            run_id=1,
            node_id=100 + part,
            node_config={"partition-id": part, "num-partitions": parts},
            state=RecordDict(),
            run_config=run_config or {},
        )

        def respond(message: Message) -> Message:
            with lock:
                return app(message, context)

        return respond

    return {100 + part: node(part) for part in range(parts)}
