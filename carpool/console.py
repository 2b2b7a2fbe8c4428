"""Where results are printed."""

from __future__ import annotations

from rich.console import Console

_LOG_WIDTH = 130


def result_console() -> Console:
    """Standard output; wide enough for a table of intervals where it is a log and no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _LOG_WIDTH))
