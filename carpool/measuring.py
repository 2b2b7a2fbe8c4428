"""What a process can measure of itself: memory and time."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def anonymous_bytes() -> int:
    """This process's anonymous memory as the kernel counts it (Linux): what no file backs.

    Raises:
        OSError: this system does not say.
    """
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Anonymous: +(\d+) kB$", text, flags=re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/smaps_rollup: expected a line 'Anonymous:', found none.")
    return int(found[1]) * 1024


def median_seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Median wall-clock seconds of a call, after two that are not counted."""
    times = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        call()
        if turn > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


class StageTimes:
    """Seconds of stages that follow each other.

    Args:
        announce: told each stage's name as it begins.
        clock: seconds, from any start.
    """

    def __init__(
        self, announce: Callable[[str], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._announce = announce
        self._clock = clock
        self._begun: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        self._begun.append((stage, self._clock()))
        self._announce(stage)

    def seconds(self) -> dict[str, float]:
        """By stage, the last one until now."""
        ends = [*(start for _, start in self._begun[1:]), self._clock()]
        return {name: end - start for (name, start), end in zip(self._begun, ends, strict=True)}
