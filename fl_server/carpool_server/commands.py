"""``carpool privacy``: one module per command's work, put together here."""

from __future__ import annotations

import typer

from carpool_server.privacy.ledger.command import ledger
from carpool_server.privacy.planning.command import plan

_NAME = "privacy"


def register(app: typer.Typer) -> None:
    """Adds the server's commands to ``app``."""
    group = privacy_group(app)
    group.command("plan")(plan)
    group.command("ledger")(ledger)


def privacy_group(app: typer.Typer) -> typer.Typer:
    """The group of ``app`` that everything about privacy goes into, made at the first call."""
    for known in app.registered_groups:
        if known.name == _NAME and known.typer_instance is not None:
            return known.typer_instance
    group = typer.Typer(no_args_is_help=True)
    group.callback()(_privacy)
    app.add_typer(group, name=_NAME)
    return group


def _privacy() -> None:
    """Plan a privacy budget, check what was spent, and audit what was promised."""
