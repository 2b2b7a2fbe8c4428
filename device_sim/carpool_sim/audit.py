"""``carpool privacy audit``: an empirical lower bound on epsilon, beside the stated one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from carpool.console import result_console
from carpool.files import write_atomically
from carpool.progress import progress
from carpool_sim.settings import find_settings

# The heavy imports (flwr, opacus) are in the command: `carpool --help` takes none of them.


def audit(
    *,
    settings: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="The run's settings, of mode central: a TOML file, or the name of shipped ones.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. rounds=5."),
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The run's registered devices: with cohort.expected_size the sampling rate. "
            "Without it, where there is a participation cap, every canary is in every round up "
            "to the cap.",
        ),
    ] = None,
    canaries: Annotated[
        int, typer.Option(min=100, help="Devices that are put in or left out by a coin each.")
    ] = 2000,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Of the lower bound.")
    ] = 0.95,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result here too.")
    ] = None,
) -> None:
    """Audit a promise: canaries through the real rounds bound epsilon from below.

    Exit code 1: the bound is above the stated epsilon, so the promise is broken.
    """
    from carpool_server.privacy.audit import run_audit  # noqa: PLC0415
    from carpool_sim.progress import ProgressHook  # noqa: PLC0415

    config = find_settings(settings, overrides=tuple(overrides or ()))
    console = Console(stderr=True)
    with progress("Audited rounds", total=config.rounds, console=console) as bar:
        result = run_audit(
            config,
            canaries=canaries,
            population=population,
            confidence=confidence,
            hooks=[ProgressHook(bar)],
        )
    if json_out is not None:
        write_atomically(json_out, result.model_dump_json(indent=2).encode() + b"\n")
    table = Table("what", "value")
    for row in result.rows():
        table.add_row(*row)
    result_console().print(table)
    typer.echo(result.sentence())
    if result.broken:
        raise typer.Exit(1)
