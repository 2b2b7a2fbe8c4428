"""The simulation's commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from carpool.console import result_console
from carpool.errors import RunStopped
from carpool.progress import progress
from carpool_server.commands import privacy_group
from carpool_sim.audit import audit
from carpool_sim.settings import find_settings

# The heavy imports (flwr, ray, torch) are in the commands: `carpool --help` takes none of them.


class _Mode(StrEnum):
    none = "none"
    central = "central"
    example_level = "example_level"
    projection = "projection"


class _Preset(StrEnum):
    small = "small"
    paper = "paper"


def register(app: typer.Typer) -> None:
    """Adds the simulation's commands to ``carpool``."""
    app.command()(federate)
    app.command()(demo)
    privacy_group(app).command("audit")(audit)


def federate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle to train.")],
    data: Annotated[Path, typer.Argument(help="Folder of the data set; its clients train.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run: checkpoint and thetas.")],
    *,
    settings: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="The run's settings: a TOML file, or shipped ones: small, small-central, paper, "
            "paper-central.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. rounds=10."),
    ] = None,
    privacy: Annotated[
        _Mode | None, typer.Option(help="Override the settings' privacy.mode.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    keep_every: Annotated[
        int, typer.Option(min=1, help="Keep the theta of every k-th round, and the last.")
    ] = 1,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="The population's privacy ledger, where several runs share its budget; by "
            "default each run has its own in OUT."
        ),
    ] = None,
) -> None:
    """Train a bundle by federated rounds over simulated devices."""
    from carpool_server.statement import privacy_statement  # noqa: PLC0415
    from carpool_sim import federate as federation  # noqa: PLC0415
    from carpool_sim.progress import ProgressHook  # noqa: PLC0415

    mode = [] if privacy is None else [f"privacy.mode={json.dumps(privacy.value)}"]
    config = find_settings(settings, overrides=(*(overrides or []), *mode))
    console = Console(stderr=True)
    with progress("Federated rounds", total=config.rounds, console=console) as bar:
        try:
            result = federation.run(
                bundle,
                data,
                out,
                config,
                resume=resume,
                hooks=[ProgressHook(bar)],
                keep_every=keep_every,
                ledger=ledger,
            )
        except RunStopped as error:
            console.print(f"{out}: {error}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from error
    if result.already_finished:
        _say(f"{out}: the run is finished already; nothing was left to do.")
    _say(f"theta: {result.theta_path}")
    for line in privacy_statement(result.info):
        _say(line)


def demo(
    *,
    out: Annotated[Path, typer.Option(help="The demo's folder; goes on with what is in it.")],
    preset: Annotated[_Preset, typer.Option(help="Which bundle to export and train.")] = (
        _Preset.small
    ),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of every run."),
    ] = None,
) -> None:
    """Text to table on real data: data set, bundle, three federated runs, report."""
    from carpool_sim.demo import REPORT_NAMES, run_demo  # noqa: PLC0415
    from carpool_sim.report.markdown import as_terminal_table, sentence  # noqa: PLC0415

    try:
        report = run_demo(out, preset=preset.value, overrides=tuple(overrides or ()), say=_say)
    except RunStopped as error:
        _say(f"{out}: {error}")
        raise typer.Exit(130) from error
    console = result_console()
    console.print(as_terminal_table(report))
    for comparison in report.comparisons:
        if comparison.metric == "acc@1":
            console.print(f"- {sentence(comparison)}", markup=False, highlight=False)
    _say(f"\nWrote {', '.join(str(out / name) for name in REPORT_NAMES)}")


def _say(text: str) -> None:
    typer.echo(text)
