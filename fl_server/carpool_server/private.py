"""Every use of a name that Flower keeps private. Tried on flwr 1.41.0.

``tests/rounds/test_flower_private.py`` fails when one of them moves.
"""

from __future__ import annotations

from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "pose_as_a_task"]


def pose_as_a_task() -> None:
    """Lets this process make messages, unless an engine does already.

    Flower's engines say which task a process works on before they start an app, and ``Message``
    refuses to be made where nobody has.
    """
    for name in ("run_id", "node_id", "task_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)
