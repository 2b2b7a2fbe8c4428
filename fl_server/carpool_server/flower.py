"""The coordinator as a Flower ``ServerApp``: the same one under every engine."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def make_server_app(run: Callable[[Grid, Context], None]) -> ServerApp:
    """A ``ServerApp`` whose main function is ``run``.

    Args:
        run: opens a run's folder and calls ``run_rounds`` on the grid. The simulation knows
            its job beforehand; an uploaded app reads it from the context's run config.
    """
    app = ServerApp()
    app.main()(run)
    return app
