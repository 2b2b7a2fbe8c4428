"""The reasons for work-arounds in docs/upstream.md: each block is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"


@pytest.mark.slow
def test_every_reason_still_holds() -> None:
    """A block that fails names a work-around that may go."""
    shared, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    quiet = "import warnings\nwarnings.simplefilter('ignore')\n"
    for block in blocks:
        assert "assert" in block
    program = "\n".join([quiet, shared, *blocks, "print('all hold')"])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("all hold\n"), done.stderr[-2000:]
