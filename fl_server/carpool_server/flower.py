"""The coordinator as a Flower ``ServerApp``: the same one under every engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from carpool.bundle import Bundle
from carpool.config import load_config
from carpool.errors import ConfigError
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import run_rounds
from carpool_server.job import Job

_FOLDERS = ("bundle", "out", "settings")


def make_server_app(run: Callable[[Grid, Context], None] | None = None) -> ServerApp:
    """The coordinator's app.

    Args:
        run: opens a run's folder and calls ``run_rounds`` on the grid, as the simulation does,
            which knows its job beforehand; None is ``serve``, as an uploaded app must.
    """
    app = ServerApp()
    app.main()(run or serve)
    return app


def serve(grid: Grid, context: Context) -> None:
    """Runs the job that the Flower run's config names.

    Keys: ``bundle``, ``out`` (the run's folder) and ``settings`` (a TOML file), on this
    machine, and ``resume``. The settings' ``simulation.aggregators`` is how many must register.

    Raises:
        ConfigError: a key is missing; and what ``run_rounds`` and opening the folder raise.
    """
    values = {name: str(context.run_config.get(name, "")) for name in _FOLDERS}
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ConfigError(
            f"expected the run config's {', '.join(missing)} to be given; use --run-config."
        )
    resume = context.run_config.get("resume", False)
    if not isinstance(resume, bool):
        raise ConfigError(f"expected the run config's resume to be true or false, got {resume!r}.")
    config = load_config(Path(values["settings"]))
    bundle = Bundle.open(Path(values["bundle"]))
    job = Job(
        config=config,
        bundle_id=bundle.id,
        layout=bundle.manifest.layout,
        initial_theta=bundle.initial_theta(),
        aggregators=config.simulation.aggregators,
    )
    folder = RunFolder(
        Path(values["out"]),
        config=config,
        bundle_id=bundle.id,
        data_id=None,
        resume=resume,
    )
    with closing(folder):
        run_rounds(grid, job, folder)
