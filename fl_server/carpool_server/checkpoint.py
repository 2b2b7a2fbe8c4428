"""A run's folder: one atomic checkpoint, the released thetas, and nobody else in it.

``checkpoint.safetensors`` is the whole state of a run after a round. The noise source is no
part of it, and a sum before noise never is.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from carpool.config import RunConfig, changed_settings
from carpool.errors import CheckpointError, ConfigError
from carpool.files import make_folder, write_atomically
from carpool.schema import Model, Sha256, describe
from carpool.theta import Layout, read_theta, write_theta
from carpool_server.hooks import RoundRecord
from carpool_server.optimizers import State
from carpool_server.participation import PARTICIPATION_NAME
from carpool_server.privacy.ledger import LEDGER_NAME

CHECKPOINT_VERSION: Literal[2] = 2
CHECKPOINT_NAME = "checkpoint.safetensors"
LOCK_NAME = ".lock"

_STATE_PREFIX = "optimizer."


Ending = Literal["budget", "participation-cap"]
"""The budget has no room for another round; too few devices are below their cap."""


class Population(Model):
    """The registered devices, without their names.

    Attributes:
        size: how many.
        digest: SHA-256 over their sorted ids.
    """

    size: Annotated[int, Field(ge=1)]
    digest: Sha256


class RunInfo(Model):
    """Everything about a run at a round but its arrays.

    Attributes:
        version: of this schema.
        run_id: random; keeps one run's messages from another's.
        round_number: rounds that are released; 0 before the first.
        config: the resolved settings, the seed among them.
        bundle_id, layout_id: what theta belongs to.
        data_id: of a simulation's data set.
        population: who may be drawn.
        noise_multiplier: z of every round; 0 where the coordinator adds no noise.
        clip_norm: C of the next round.
        sampling_key: of the cohorts where it must stay secret; the file is then readable by
            its owner alone.
        contributors: devices in the last round's sum; for the operator, as the next two.
        largest_participation: most rounds that any device is in, where a cap is kept.
        participations: of all devices in all rounds and attempts, likewise.
        ledger_head: hash of the ledger's last line before the last round's release.
        ended: why the run is over before its last round.
        versions: of what computed this run; informative.
        history: the rounds' numbers.
    """

    version: Literal[2] = CHECKPOINT_VERSION
    run_id: str
    round_number: Annotated[int, Field(ge=0)]
    config: RunConfig
    bundle_id: Sha256
    layout_id: Sha256
    data_id: Sha256 | None
    population: Population
    noise_multiplier: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)]
    sampling_key: Sha256 | None
    contributors: Annotated[int, Field(ge=0)] = 0
    largest_participation: Annotated[int, Field(ge=0)] = 0
    participations: Annotated[int, Field(ge=0)] = 0
    ledger_head: Sha256 | None = None
    ended: Ending | None = None
    versions: dict[str, str]
    history: tuple[RoundRecord, ...]

    @property
    def finished(self) -> bool:
        """Whether all rounds are released, or no other one will be."""
        return self.round_number == self.config.rounds or self.ended is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after a round: float32 theta, the optimiser's float64 arrays, and the rest."""

    info: RunInfo
    theta: NDArray[np.float32]
    optimizer: State


def release_name(round_number: int) -> str:
    """The file name of a round's released theta."""
    return f"theta-round-{round_number:04d}.safetensors"


def encode(state: RunState) -> bytes:
    """A checkpoint's bytes: safetensors, whose metadata holds ``info`` and a digest of all."""
    arrays: dict[str, NDArray[np.generic]] = {"theta": state.theta}
    arrays |= {_STATE_PREFIX + name: values for name, values in state.optimizer.items()}
    info = json.dumps(state.info.model_dump(mode="json"), sort_keys=True)
    return save(arrays, metadata={"info": info, "digest": _digest(info, arrays)})


def read_checkpoint(path: Path) -> RunState:
    """Reads a checkpoint and checks that it is whole.

    Raises:
        CheckpointError: the file is missing, torn or changed, or of another schema version;
            names the file, what was expected and what was found.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a whole checkpoint, got: {error}") from error
    text = metadata.get("info", "")
    if metadata.get("digest") != _digest(text, arrays) or "theta" not in arrays:
        raise CheckpointError(
            f"{path}: expected a checkpoint that matches its digest, got changed bytes. "
            "Restore the file, or start a new run in another folder."
        )
    version = json.loads(text).get("version")
    if version != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {CHECKPOINT_VERSION}, got {version!r}. "
            "Resume it with the version of carpool that wrote it."
        )
    try:
        info = RunInfo.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe(error, RunInfo)}") from error
    optimizer = {
        name.removeprefix(_STATE_PREFIX): values
        for name, values in arrays.items()
        if name.startswith(_STATE_PREFIX)
    }
    return RunState(info=info, theta=arrays["theta"], optimizer=optimizer)


class RunFolder:
    """A run's folder, held by one process at a time. Close it after use.

    Attributes:
        path: the folder.
        state: the checkpoint that was found and may be resumed, or None.

    Args:
        path: made where it is missing.
        config: the settings asked for now.
        bundle_id: the bundle asked for now.
        data_id: the data set asked for now, where it is known.
        resume: whether a run is expected there.
        keep_every: keep the released theta of every k-th round, and of the last.

    Raises:
        CheckpointError: a run where none was expected, or none where one was; a checkpoint
            that is torn or of another version, bundle or data set; another process in it.
        ConfigError: settings that differ from the checkpoint's, each named.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: RunConfig,
        bundle_id: str,
        data_id: str | None,
        resume: bool,
        keep_every: int = 1,
    ) -> None:
        self.path = path
        self._keep_every = keep_every
        make_folder(path)
        self._lock = _locked(path / LOCK_NAME)
        try:
            self.state = self._found(resume=resume)
            if self.state is not None:
                _check_same(self.state.info, path, config, bundle_id, data_id)
            _remove_strays(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def write(self, state: RunState) -> None:
        """Replaces the checkpoint, durably and atomically."""
        private = state.info.sampling_key is not None
        write_atomically(self.path / CHECKPOINT_NAME, encode(state), private=private)
        self.state = state

    def release(self, state: RunState, *, layout: Layout) -> Path | None:
        """Writes the round's released theta where it is kept and not there yet.

        Raises:
            CheckpointError: another theta is there under the round's name.
        """
        info = state.info
        if info.round_number % self._keep_every and not info.finished:
            return None
        path = self.release_path(info.round_number)
        if path.exists():
            found = read_theta(path, layout=layout, bundle_id=info.bundle_id)
            if not np.array_equal(found, state.theta):
                raise CheckpointError(
                    f"{path}: expected this run's theta of round {info.round_number}, got another "
                    "one. Start a new run in another folder."
                )
        else:
            write_theta(
                path,
                state.theta,
                layout=layout,
                bundle_id=info.bundle_id,
                round_number=info.round_number,
            )
        return path

    def release_path(self, round_number: int) -> Path:
        """Where a round's released theta is, if it is kept."""
        return self.path / release_name(round_number)

    def _found(self, *, resume: bool) -> RunState | None:
        path = self.path / CHECKPOINT_NAME
        if path.exists() and not resume:
            raise CheckpointError(
                f"{self.path}: expected a folder without a run, found {CHECKPOINT_NAME}. "
                "Add --resume to go on with it, or choose another folder."
            )
        if not path.exists() and resume:
            raise CheckpointError(
                f"{self.path}: expected a run to resume, found no {CHECKPOINT_NAME}. "
                "Leave out --resume to start one."
            )
        if resume:
            state = read_checkpoint(path)
            number = state.info.round_number
            later = [name for name in self._released() if _round_of(name) > number]
            if later:
                raise CheckpointError(
                    f"{self.path}: expected no release after round {number}, the "
                    f"checkpoint's, found {later[-1]}. Restore the newest checkpoint, or start a "
                    "new run in another folder."
                )
            return state
        left = self._released()
        books = (LEDGER_NAME, PARTICIPATION_NAME)
        left += [name for name in books if (self.path / name).exists()]
        if left:
            raise CheckpointError(
                f"{self.path}: expected a folder without a run, found {left[0]}, which an earlier "
                "one left. Choose another folder."
            )
        return None

    def _released(self) -> list[str]:
        """The names of the released thetas, by round."""
        names = (path.name for path in self.path.glob("theta-round-*.safetensors"))
        return sorted((name for name in names if _round_of(name) > 0), key=_round_of)


def _round_of(name: str) -> int:
    """The round of a released theta's file; 0 where the name is none."""
    found = re.fullmatch(r"theta-round-(\d+)\.safetensors", name)
    return 0 if found is None else int(found[1])


def _check_same(
    info: RunInfo, folder: Path, config: RunConfig, bundle_id: str, data_id: str | None
) -> None:
    changed = changed_settings(info.config, config)
    if changed:
        raise ConfigError(
            f"{folder}: expected the settings of the run that is resumed; changed: "
            f"{'; '.join(changed)}. Put them back, or start a new run in another folder."
        )
    pairs = [("bundle", info.bundle_id, bundle_id)]
    if data_id is not None:
        pairs.append(("data set", info.data_id or "none", data_id))
    for name, expected, found in pairs:
        if found != expected:
            raise CheckpointError(
                f"{folder}: expected the {name} {expected} of the run that is resumed, "
                f"got {found}. Use the same {name}, or start a new run in another folder."
            )


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(
            f"{path.parent}: expected a folder that no process is using, but a run is going on "
            "in it. Wait for it, or stop it first."
        ) from error
    return descriptor


def _remove_strays(folder: Path) -> None:
    """Half-written files of a process that was killed: never part of a run."""
    for path in folder.glob(".*.safetensors.*"):
        path.unlink(missing_ok=True)


def _digest(info: str, arrays: dict[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(info.encode())
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
