"""Turns: who is called when, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

PAUSE_SECONDS = 0.05
"""Before each turn: the other side's idle threads spin for a while and would slow this one."""

CALLS = 3
"""In each turn; the first is not counted."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Runner(NamedTuple):
    """What is timed, with PyTorch's threads set to ``threads``."""

    step: Callable[[], object]
    threads: int
    slow: bool


def take_turns(
    runners: Sequence[Runner], *, repeats: int, clock: Callable[[], float]
) -> list[list[float]]:
    """The seconds of every counted call of each.

    Each has ``repeats`` turns after one to warm up; a slow one has a single turn, the last.
    """
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(repeats + 1):
        for runner, seconds in zip(runners, times, strict=True):
            if runner.slow and turn < repeats:
                continue
            torch.set_num_threads(runner.threads)
            time.sleep(PAUSE_SECONDS)
            for call in range(CALLS):
                start = clock()
                runner.step()
                if turn and call:
                    seconds.append(clock() - start)
    return times
