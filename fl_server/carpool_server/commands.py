"""``carpool privacy``: one module per command's work, put together here."""

from __future__ import annotations

import typer

from carpool_server.privacy.ledger.command import ledger
from carpool_server.privacy.planning.command import plan


def register(app: typer.Typer) -> None:
    """Adds the server's commands to ``app``."""
    group = typer.Typer(
        help="Plan a privacy budget, and check what was spent.", no_args_is_help=True
    )
    group.callback()(_privacy)
    group.command("plan")(plan)
    group.command("ledger")(ledger)
    app.add_typer(group, name="privacy")


def _privacy() -> None:
    """Plan a privacy budget, and check what was spent."""
