"""The simulation's commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from carpool.config import load_config
from carpool.errors import RunStopped
from carpool.progress import Bar, progress

if TYPE_CHECKING:
    from carpool_server.hooks import RoundFacts

# The heavy imports (flwr, ray, torch) are in the commands: `carpool --help` takes none of them.


class _Mode(StrEnum):
    none = "none"
    central = "central"


def register(app: typer.Typer) -> None:
    """Adds the simulation's commands to ``carpool``."""
    app.command()(federate)


def federate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle to train.")],
    data: Annotated[Path, typer.Argument(help="Folder of the data set; its clients train.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run: checkpoint and thetas.")],
    *,
    settings: Annotated[Path, typer.Option(help="The run's settings, a TOML file.")],
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
) -> None:
    """Train a bundle by federated rounds over simulated devices."""
    from carpool_sim import federate as federation  # noqa: PLC0415

    mode = [] if privacy is None else [f"privacy.mode={json.dumps(privacy.value)}"]
    config = load_config(settings, overrides=[*(overrides or []), *mode])
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
            )
        except RunStopped as error:
            console.print(f"{out}: {error}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from error
    if result.already_finished:
        _say(f"{out}: the run is finished already; nothing was left to do.")
    _say(f"theta: {result.theta_path}")
    if result.epsilon is not None:
        _say(
            f"privacy: epsilon {result.epsilon:.2f} at delta {config.privacy.delta:g} was spent; "
            "unit: one client, over all rounds (PRV accountant)."
        )


class ProgressHook:
    """Moves a progress bar by a run's rounds."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._done = 0

    def after_round(self, facts: RoundFacts) -> None:
        """Shows the round's loss or epsilon and its time."""
        record = facts.record
        notes = [f"{record.seconds:.1f} s"]
        if record.mean_loss is not None:
            notes.insert(0, f"loss {record.mean_loss:.3f}")
        if record.epsilon is not None:
            notes.insert(0, f"epsilon {record.epsilon:.2f}")
        if record.rejected:
            notes.append(f"{len(record.rejected)} rejected")
        self._bar.advance(facts.round_number - self._done, note=", ".join(notes))
        self._done = facts.round_number


def _say(text: str) -> None:
    typer.echo(text)
