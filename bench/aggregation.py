"""One update clipped, put on the grid and added, against numpy's ``a += b`` of its length.

    python bench/aggregation.py [--values 400000] [--turns 200]

Also what a round adds at its end: noise for every value. All in turns in one process, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from carpool_server.aggregation import Total
from carpool_server.privacy.clipping import clip_onto
from carpool_server.privacy.noise import gaussian_on_grid


def sides(num_values: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the first is what the others are compared with."""
    generator = np.random.default_rng(0)
    update = generator.standard_normal(num_values).astype(np.float32)
    total = Total(num_values=num_values, capacity=1 << 20)
    a, b = generator.standard_normal((2, num_values))

    def added() -> None:
        nonlocal a
        a += b

    def clipped(clip_norm: float) -> Callable[[], object]:
        return lambda: clip_onto(total.values, update, clip_norm=clip_norm, device_id="d")

    return {
        "a += b, float64": added,
        "an update beyond the clip: clipped, gridded, added": clipped(0.5),
        "an update within the clip: gridded, added": clipped(1e6),
        "noise for a sum (once a round)": lambda: gaussian_on_grid(num_values, scale=1 << 30),
    }


def main() -> None:
    """Prints a row per side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=400_000)
    parser.add_argument("--turns", type=int, default=200)
    arguments = parser.parse_args()
    calls = sides(arguments.values)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(arguments.turns + 2):
        for name, call in calls.items():
            call()  # in turns: the caches hold what this side touches
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    base = medians["a += b, float64"]
    print(f"{arguments.values:,} values, medians of {arguments.turns} turns")
    print("| what | ms | times `a += b` |\n|---|---:|---:|")
    for name, taken in medians.items():
        print(f"| {name} | {1e3 * taken:.2f} | {taken / base:.1f} |")


if __name__ == "__main__":
    main()
