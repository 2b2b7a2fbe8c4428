"""The command ``carpool``: its own options, and the subcommands that each side plugs in.

A side registers through the entry-point group ``carpool.commands``; the entry's name is also
the extra that installs what the side needs. A side that cannot be loaded is missing from the
help and breaks nothing else; asked for, it says which extra to install.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    import click  # typer's own dependency: here for the types of its methods alone

ENTRY_POINT_GROUP = "carpool.commands"


class _Sides:
    """Which side each command came from, and which sides could not be loaded."""

    def __init__(self) -> None:
        self.of_command: dict[str, str] = {}
        self.missing: dict[str, ModuleNotFoundError] = {}


class _Root(TyperGroup):
    """The root group: hints at extras where something is not installed."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or an error with a hint where a missing side may have brought it.

        Raises:
            CarpoolError: there is no such command, and a side could not be loaded.
        """
        command = super().get_command(ctx, cmd_name)
        sides = _sides_of(ctx)
        if command is None and sides.missing and not ctx.resilient_parsing:
            named = {n: e for n, e in sides.missing.items() if n == cmd_name} or sides.missing
            reasons = "; ".join(f"{name} ({error})" for name, error in named.items())
            raise CarpoolError(
                f"carpool {cmd_name}: no such command here, and these parts are not installed: "
                f"{reasons}. Install with: {' or '.join(map(_pip_install, named))}"
            )
        return command

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  click's own signature
        """Runs the command.

        Raises:
            CarpoolError: an optional dependency is not installed; names the extra.
            typer.Exit: 130 on Ctrl-C, after one line.
        """
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in _optional_modules():
                raise
            extra = _sides_of(ctx).of_command.get(ctx.invoked_subcommand or "", "sim")
            raise CarpoolError(
                f"carpool {ctx.invoked_subcommand}: needs {module}, which is not installed. "
                f"Install with: {_pip_install(extra)}"
            ) from error
        except KeyboardInterrupt as error:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from error


def _print_version(value: bool) -> None:  # noqa: FBT001  typer's callback
    if value:
        typer.echo(f"carpool {importlib.metadata.version('carpool')}")
        raise typer.Exit


def _root_options(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train a retriever across phones without seeing their text."""


def build_app() -> typer.Typer:
    """The whole application, with the subcommands of every side that can be loaded."""
    sides = _Sides()
    app = typer.Typer(
        name="carpool",
        cls=_Root,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # a bug's traceback as Python prints it, without locals
        context_settings={"obj": sides, "help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root_options)
    known: set[str] = set()
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)):
        try:
            entry.load()(app)
        except ModuleNotFoundError as error:  # any other ImportError is a bug, and shows itself
            sides.missing[entry.name] = error
            continue
        names = _command_names(app)
        sides.of_command |= dict.fromkeys(names - known, entry.name)
        known = names
    return app


def main() -> None:
    """Runs ``carpool``. A ``CarpoolError`` becomes red text on standard error and exit code 2.

    Other exceptions are bugs and keep their traceback. Ctrl-C exits with 130.
    """
    try:
        build_app()()
    except CarpoolError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        sys.exit(130)


def _sides_of(ctx: click.Context) -> _Sides:
    return ctx.find_object(_Sides) or _Sides()


def _pip_install(extra: str) -> str:
    return f"pip install 'carpool[{extra}]'"


def _command_names(app: typer.Typer) -> set[str]:
    group = typer.main.get_command(app)
    return set(group.commands) if isinstance(group, TyperGroup) else set()


def _optional_modules() -> set[str]:
    """The import names of the packages that only an extra installs."""
    requirements = importlib.metadata.requires("carpool") or []
    extras = [r for r in requirements if "extra ==" in r]
    names = {re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0] for r in extras}
    # Ray comes through flwr's own extra "simulation".
    return {name.replace("-", "_").lower() for name in names} | {"ray"}
