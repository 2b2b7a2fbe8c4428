"""Progress: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import carpool.progress
from carpool.measuring import StageTimes
from carpool.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(carpool.progress.time, "monotonic", lambda: now[0])
    return now


def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_first_last_and_a_line_every_ten_seconds(clock: list[float]) -> None:
    """A thousand steps do not make a thousand lines, and the end is never missing."""
    console = log()
    with progress("rounds", total=1000, console=console) as bar:
        for step in range(1000):
            clock[0] += 1 / 32
            bar.advance(note=f"loss [{step}]")
    assert lines(console) == [
        "rounds: 0/1000",
        "rounds: 320/1000 loss [319]",
        "rounds: 640/1000 loss [639]",
        "rounds: 960/1000 loss [959]",
        "rounds: 1000/1000 loss [999]",
    ]


def test_an_unknown_total_is_no_total(clock: list[float]) -> None:
    """Just a count."""
    console = log()
    with progress("steps", total=None, console=console) as bar:
        clock[0] += 60
        bar.advance(3)
    assert lines(console) == ["steps: 0", "steps: 3"]


def test_a_terminal_gets_a_bar() -> None:
    """Description and note are text and no markup."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress("rounds [red]", total=2, console=console) as bar:
        bar.advance(2, note="loss [bold]")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "rounds [red]" in shown
    assert "loss [bold]" in shown
    assert "2/2" in shown


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is for results."""
    with progress("rounds", total=1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "rounds: 0/1\nrounds: 1/1\n")


def test_stages_are_timed_as_they_are_announced() -> None:
    """The last one until it is asked."""
    announced: list[str] = []
    ticks = iter([1.0, 4.0, 9.0])
    times = StageTimes(announced.append, clock=lambda: next(ticks))
    times("trace")
    times("lower")
    assert announced == ["trace", "lower"]
    assert times.seconds() == {"trace": 3.0, "lower": 5.0}
