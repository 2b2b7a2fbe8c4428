"""A checkpoint is whole or refused."""

from __future__ import annotations

import json
import os
import stat
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from carpool.config import RunConfig, parse_config
from carpool.errors import CheckpointError
from carpool_server import checkpoint
from carpool_server.checkpoint import (
    Population,
    RunFolder,
    RunInfo,
    RunState,
    encode,
    read_checkpoint,
)

CONFIG = parse_config(
    {
        "rounds": 2,
        "seed": 1,
        "privacy": {"mode": "none", "clip_norm": 0.1},
        "cohort": {"expected_size": 3.0},
        "local": {"learning_rate": 0.1, "epochs": 1},
        "server": {"kind": "sgd", "learning_rate": 1.0},
    },
    source="test",
)


def state(*, sampling_key: str | None = None, config: RunConfig = CONFIG) -> RunState:
    info = RunInfo(
        run_id="r",
        round_number=1,
        config=config,
        bundle_id="b" * 64,
        layout_id="c" * 64,
        data_id=None,
        population=Population(size=5, digest="d" * 64),
        noise_multiplier=0.1 + 0.2,
        clip_norm=config.privacy.clip_norm,
        sampling_key=sampling_key,
        versions={"carpool": "0"},
        history=(),
    )
    generator = np.random.default_rng(0)
    return RunState(
        info=info,
        theta=generator.standard_normal(40).astype(np.float32),
        optimizer={"first": generator.standard_normal(40), "second": np.full(40, 1e-300)},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def test_everything_comes_back_bit_for_bit(path: Path) -> None:
    """float32 theta, float64 state, floats in the settings."""
    path.write_bytes(encode(state()))
    found = read_checkpoint(path)
    assert found.info == state().info
    assert found.theta.tobytes() == state().theta.tobytes()
    assert found.theta.dtype == np.float32
    for name, values in state().optimizer.items():
        assert found.optimizer[name].tobytes() == values.tobytes()
        assert found.optimizer[name].dtype == np.float64


def test_any_changed_byte_is_noticed(path: Path) -> None:
    """In header, settings, theta and optimiser state."""
    data = encode(state())
    for place in [*range(8, len(data), 97), len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_torn_file_is_refused_and_named(path: Path, share: float) -> None:
    """Cut off anywhere."""
    data = encode(state())
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: expected a whole checkpoint, got: ")


def test_changed_values_are_refused_with_what_to_do(path: Path) -> None:
    """The whole message."""
    data = bytearray(encode(state()))
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: expected a checkpoint that matches its digest, got changed bytes. "
        "Restore the file, or start a new run in another folder."
    )


def test_another_schema_version_is_refused(path: Path) -> None:
    """Before its fields are looked at."""
    arrays = {"theta": state().theta}
    text = json.dumps({"version": 1})
    digest = checkpoint._digest(text, arrays)
    path.write_bytes(save(arrays, metadata={"info": text, "digest": digest}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: expected checkpoint version 2, got 1. Resume it with the version of carpool "
        "that wrote it."
    )


@pytest.mark.parametrize(("key", "mode"), [(None, 0o644), ("e" * 64, 0o600)])
def test_a_secret_key_makes_the_file_private(tmp_path: Path, key: str | None, mode: int) -> None:
    """Readable by its owner alone, also after it was replaced."""
    folder = RunFolder(tmp_path, config=CONFIG, bundle_id="b" * 64, data_id=None, resume=False)
    with closing(folder):
        for _ in range(2):
            folder.write(state(sampling_key=key))
            found = (tmp_path / checkpoint.CHECKPOINT_NAME).stat().st_mode
            assert stat.S_IMODE(found) == mode


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the disk gives up in the middle: the old bytes, and nothing beside them."""
    folder = RunFolder(tmp_path, config=CONFIG, bundle_id="b" * 64, data_id=None, resume=False)
    with closing(folder):
        folder.write(state())
        before = (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes()

        def fail(_descriptor: int) -> None:
            raise OSError("no space")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            folder.write(state(sampling_key="e" * 64))
    assert (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", checkpoint.CHECKPOINT_NAME]


def test_rounds_of_five_digits_come_after_those_of_four(tmp_path: Path) -> None:
    """By number: as text round 10000 would come before round 9999."""
    names = ["theta-round-10000.safetensors", "theta-round-9999.safetensors", "theta-round-x.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert checkpoint.release_name(10000) == names[0]
    with pytest.raises(CheckpointError) as caught:
        RunFolder(tmp_path, config=CONFIG, bundle_id="b" * 64, data_id=None, resume=False)
    assert f"found {names[1]}, which an earlier one left" in str(caught.value)
