from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's folder."""
    return ROOT


@pytest.fixture(scope="session")
def carpool() -> Callable[..., str]:
    """Runs the real command line in a folder and gives what it printed."""

    def run(*arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from carpool.cli import main; main()", *arguments],
            cwd=cwd,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"carpool {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run
