"""Settings that are small and quick, and an audit that keeps what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from carpool.config import RunConfig, parse_config
from carpool_server.job import RunResult

RunHere = Callable[..., RunResult]
"""The fixture ``run_here``."""


class Witness:
    """An audit that keeps what it sees."""

    def __init__(self) -> None:
        self.sums: dict[int, np.ndarray] = {}
        self.devices: dict[int, tuple[str, ...]] = {}
        self.steps: list[tuple[int, str]] = []

    def summed(self, round_number: int, total: np.ndarray, device_ids: tuple[str, ...]) -> None:
        """Keeps sum and devices."""
        self.sums[round_number] = total
        self.devices[round_number] = device_ids

    def reached(self, round_number: int, step: str) -> None:
        """Keeps the boundary."""
        self.steps.append((round_number, step))


def settings(*, mode: str = "none", **changes: object) -> RunConfig:
    """Small and quick; ``changes`` are sections or single values of the settings."""
    private = {"epsilon": 4.0, "delta": 1e-5, "regime": "poisson"} if mode == "central" else {}
    values: dict[str, Any] = {
        "rounds": 3,
        "seed": 5,
        "privacy": {"mode": mode, "clip_norm": 0.5, **private},
        "cohort": {"expected_size": 12.0, "quorum": 0.8, "deadline_seconds": 5.0, "extensions": 1},
        "local": {"learning_rate": 0.05, "epochs": 1, "batch_size": 4},
        "server": {"kind": "adam", "learning_rate": 0.03, "hold": 0.5},
    }
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return parse_config(values, source="test settings")
