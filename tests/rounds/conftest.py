from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_farm
import numpy as np
import pytest
from round_kit import settings
from tiny_data import write_tiny_data

import carpool_sim  # noqa: F401  sets Flower's and Ray's environment before they are imported
from carpool.config import RunConfig
from carpool_server.checkpoint import RunFolder
from carpool_server.coordinator import run_rounds
from carpool_server.in_process import LocalGrid, Respond
from carpool_server.job import Job, RunResult
from carpool_sim.aggregator import Sources


@pytest.fixture
def run_here(tmp_path: Path) -> Callable[..., RunResult]:
    """Runs the coordinator over nodes in this process."""

    def run(
        nodes: dict[int, Respond],
        *,
        config: RunConfig | None = None,
        out: str = "run",
        resume: bool = False,
        keep_every: int = 1,
        bundle_id: str = fake_farm.BUNDLE_ID,
        data_id: str | None = fake_farm.DATA_ID,
        **job: object,
    ) -> RunResult:
        config = config or settings()
        folder = RunFolder(
            tmp_path / out,
            config=config,
            bundle_id=bundle_id,
            data_id=data_id,
            resume=resume,
            keep_every=keep_every,
        )
        with closing(folder):
            arguments: dict[str, Any] = {
                "config": config,
                "bundle_id": bundle_id,
                "layout": fake_farm.LAYOUT,
                "initial_theta": np.zeros(fake_farm.NUM_VALUES, dtype=np.float32),
                "aggregators": len(nodes),
                "registration_seconds": 5.0,
            }
            return run_rounds(LocalGrid(nodes), Job(**(arguments | job)), folder)

    return run


@pytest.fixture(scope="session")
def tiny_bundle_path(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny.write_tiny_bundle(path, tiny.program_bytes())
    return path


@pytest.fixture(scope="session")
def tiny_data_path(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(
        tmp_path_factory.mktemp("data") / "tiny", documents=tiny.DOCUMENTS, words=tiny.WORDS
    )


@pytest.fixture
def sources(tiny_bundle_path: Path, tiny_data_path: Path) -> Sources:
    return Sources(bundle=str(tiny_bundle_path), data=str(tiny_data_path))
