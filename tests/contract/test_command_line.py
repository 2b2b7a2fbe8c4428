"""The root command: exit codes, one-line errors, missing sides, fast start-up."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

import carpool.cli
from carpool.errors import ConfigError

Register = Callable[[typer.Typer], None]


class FakeEntryPoint:
    """An entry point whose loading may fail as that of a side without its dependencies."""

    def __init__(self, name: str, result: Register | ImportError) -> None:
        self.name = name
        self.result = result

    def __lt__(self, other: FakeEntryPoint) -> bool:
        """As the real ones, which are sorted before they are loaded."""
        return self.name < other.name

    def load(self) -> Register:
        """What loading the side's module gives."""
        if isinstance(self.result, ImportError):
            raise self.result
        return self.result


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these sides the installed ones."""

    def install_sides(**sides: Register | ImportError) -> None:
        entries = [FakeEntryPoint(name, result) for name, result in sides.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)  # noqa: ARG005  the real one's signature

    return install_sides


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``main`` in this process; returns exit code, standard output and standard error."""

    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["carpool", *arguments])
        try:
            carpool.cli.main()
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return code, out, err

    return run_main


def command(body: Callable[[], None], name: str = "work") -> Register:
    def register(app: typer.Typer) -> None:
        app.command(name=name)(body)
        app.command(name=f"{name}-not")(lambda: None)

    return register


MISSING_TORCH = ModuleNotFoundError("No module named 'torch'", name="torch")


def test_an_expected_error_is_one_red_line_and_exit_code_2(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """On standard error, with no traceback (the colour goes where there is no terminal)."""

    def fail() -> None:
        raise ConfigError("run.toml: rounds [1]: expected more, got 0.")

    install(sim=command(fail))
    assert run("work") == (2, "", "Error: run.toml: rounds [1]: expected more, got 0.\n")


def test_the_error_line_is_red_on_a_terminal(
    install: Install,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ANSI red around the whole line."""

    def fail() -> None:
        raise ConfigError("wrong")

    install(sim=command(fail))
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    assert run("work")[2] == "\x1b[31mError: wrong\x1b[0m\n"


def test_a_bug_keeps_its_traceback(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Nothing swallows an exception that is not ours."""

    def fail() -> None:
        raise ZeroDivisionError

    install(sim=command(fail))
    with pytest.raises(ZeroDivisionError):
        run("work")


def test_ctrl_c_is_one_line_and_exit_code_130(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """As shells expect of an interrupted command."""

    def stop() -> None:
        raise KeyboardInterrupt

    install(sim=command(stop))
    assert run("work") == (130, "", "\nInterrupted.\n")


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_sigint")
def test_sigint_to_the_real_command_exits_with_130(tmp_path: Path) -> None:
    """A real process, interrupted while a command waits for a pipe."""
    pipe = tmp_path / "documents"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [carpool_command(), "data", "import", "out", "--documents", str(pipe), "--examples", "x"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        with pipe.open("w"):  # returns once the command has opened its end
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "\nInterrupted.\n"


def test_a_missing_side_breaks_nothing_else(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Help and other sides' commands work, and help says nothing of it."""
    install(device=MISSING_TORCH, sim=command(lambda: None))
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "work" in out
    assert "device" not in out
    assert run("work") == (0, "", "")


def test_a_missing_side_names_its_extra_when_asked_for(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """By the side's own name, and by a command that only it might have brought."""
    install(device=MISSING_TORCH, export=MISSING_TORCH, sim=command(lambda: None))
    assert run("export") == (
        2,
        "",
        (
            "Error: carpool export: no such command here, and these parts are not installed: "
            "export (No module named 'torch'). Install with: pip install 'carpool[export]'\n"
        ),
    )
    assert run("search") == (
        2,
        "",
        (
            "Error: carpool search: no such command here, and these parts are not installed: "
            "device (No module named 'torch'); export (No module named 'torch'). "
            "Install with: pip install 'carpool[device]' or pip install 'carpool[export]'\n"
        ),
    )


def test_a_bug_in_a_side_is_not_taken_for_a_missing_one(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """A wrong name in an import statement shows itself."""
    install(device=ImportError("cannot import name 'x'"))
    with pytest.raises(ImportError, match="cannot import name 'x'"):
        run("--help")


def test_a_dependency_missing_at_work_names_the_sides_extra(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Sides import heavy things when a command runs: then the hint comes then."""

    def work() -> None:
        raise MISSING_TORCH

    install(device=command(lambda: None, name="search"), export=command(work))
    assert run("work") == (
        2,
        "",
        (
            "Error: carpool work: needs torch, which is not installed. "
            "Install with: pip install 'carpool[export]'\n"
        ),
    )


def test_a_missing_module_of_our_own_is_a_bug(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Only what an extra installs gets the hint."""

    def work() -> None:
        raise ModuleNotFoundError("No module named 'carpool.x'", name="carpool.x")

    install(sim=command(work))
    with pytest.raises(ModuleNotFoundError):
        run("work")


def test_an_unknown_command_is_a_usage_error(
    install: Install, run: Callable[..., tuple[int, str, str]]
) -> None:
    """With every side installed there is no hint at extras."""
    install(sim=command(lambda: None))
    code, _, err = run("wrok")
    assert code == 2
    assert "No such command" in err
    assert "pip install" not in err


def test_every_registered_side_names_an_extra() -> None:
    """The hint's extra exists: entry points and extras have the same names."""
    entries = importlib.metadata.entry_points(group=carpool.cli.ENTRY_POINT_GROUP)
    extras = importlib.metadata.metadata("carpool").get_all("Provides-Extra") or []
    assert {e.name for e in entries if e.value.startswith("carpool")} <= set(extras)


def test_version_is_the_distributions() -> None:
    """The real command, in a process of its own."""
    done = subprocess.run(
        [carpool_command(), "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"carpool {importlib.metadata.version('carpool')}\n"


def carpool_command() -> str:
    return str(Path(sys.executable).with_name("carpool"))
