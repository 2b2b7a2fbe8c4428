"""docs/commands.md against the real command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_commands_page_is_what_the_command_line_says() -> None:
    """A command, argument or option that is not documented, or documented wrongly, fails here."""
    script = ROOT / "docs" / "make_commands.py"
    code = f"import runpy; print(runpy.run_path({str(script)!r})['text'](), end='')"
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == made.stdout


def test_every_argument_and_option_says_what_it_is() -> None:
    """No row of the page has an empty last column: `--help` explains everything."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    assert [row for row in rows if row.endswith("|  |")] == []
