"""What Flower keeps private and carpool uses, and that it is still needed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from carpool_server import private
from carpool_server.in_process import LocalGrid


def test_the_private_names_are_where_they_were() -> None:
    """When this fails, look at ``carpool_server/private.py`` and say there what was tried."""
    assert importlib.metadata.version("flwr").startswith("1.41.")
    private.pose_as_a_task()
    for name in ("run_id", "node_id", "task_id"):
        assert getattr(TaskIdentity, name) >= 1
    assert Grid.run.fget.__annotations__["return"] in (private.Run, "Run")


def test_without_it_no_message_can_be_made() -> None:
    """In a fresh process: when this fails, ``pose_as_a_task`` may go."""
    program = (
        "from flwr.app import Message, RecordDict\n"
        "Message(RecordDict(), dst_node_id=1, message_type='train')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "TaskIdentity.run_id is not set" in done.stderr


def test_an_engines_own_identity_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid in a process that an engine has told what it works on."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    LocalGrid({})
    assert TaskIdentity.run_id == 7
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    assert message.metadata.run_id == 7
