"""Progress that is a bar on a terminal and plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0
"""Seconds between two lines where there is no terminal; first and last are always printed."""


class Bar:
    """One piece of work under way. Get one from ``progress``."""

    def __init__(self, description: str, *, total: int | None, console: Console) -> None:
        self._description = description
        self._total = total
        self._console = console
        self._done = 0
        self._note = ""

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """Counts ``count`` more as done; ``note`` (a loss, a stage) replaces the last note."""
        self._done += count
        if note is not None:
            self._note = note
        self._show()

    def _show(self) -> None:
        raise NotImplementedError

    @property
    def _line(self) -> str:
        of = "" if self._total is None else f"/{self._total}"
        return f"{self._description}: {self._done}{of} {self._note}".rstrip()


class _PlainBar(Bar):
    _last_shown = float("-inf")

    def _show(self) -> None:
        now = time.monotonic()
        if self._done == self._total or now - self._last_shown >= PLAIN_SECONDS:
            self._last_shown = now
            self._console.print(self._line, markup=False, highlight=False, soft_wrap=True)


class _TerminalBar(Bar):
    def attach(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task(escape(self._description), total=self._total, note="")

    def _show(self) -> None:
        self._bars.update(self._task, completed=self._done, note=escape(self._note))


@contextmanager
def progress(
    description: str, *, total: int | None, console: Console | None = None
) -> Iterator[Bar]:
    """Shows progress on standard error while the block runs.

    Args:
        description: what is being done.
        total: how many steps, or None where it is not known.
        console: where to show it; standard error by default.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        bar: Bar = _PlainBar(description, total=total, console=console)
        bar.advance(0)
        yield bar
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        terminal_bar = _TerminalBar(description, total=total, console=console)
        terminal_bar.attach(bars)
        yield terminal_bar


@contextmanager
def stages(description: str, *, total: int) -> Iterator[Callable[[str], None]]:
    """Shows progress through ``total`` named stages; call what it yields as each one begins."""
    with progress(description, total=total) as bar:
        begun = 0

        def begin(stage: str) -> None:
            nonlocal begun
            bar.advance(1 if begun else 0, note=stage)
            begun += 1

        yield begin
        bar.advance(note="done")
