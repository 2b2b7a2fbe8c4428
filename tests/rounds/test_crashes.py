"""A coordinator that is killed, at every boundary of a round and at random moments.

The process is a forked child that runs the real loop, ledger and files over aggregators in
the same process; ``os._exit`` and SIGKILL leave it no chance to tidy up.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import get_args

import fake_farm
import numpy as np
import pytest
from fake_farm import FakeAggregator, dealt
from round_kit import settings

from carpool.config import RunConfig
from carpool.theta import read_theta
from carpool_server.checkpoint import CHECKPOINT_NAME, RunFolder, read_checkpoint
from carpool_server.coordinator import run_rounds
from carpool_server.hooks import Step
from carpool_server.in_process import LocalGrid
from carpool_server.job import Job
from carpool_server.participation import PARTICIPATION_NAME, Participation
from carpool_server.privacy.accounting import Epsilon
from carpool_server.privacy.ledger import LEDGER_NAME, ledger, read_ledger

STEPS: tuple[Step, ...] = get_args(Step)
MODES = ("none", "central", "capped")
KILLED = 137


class Crashing:
    """An audit that writes down a hash and a piece of every sum, and dies at a boundary."""

    def __init__(self, log: Path, *, at: tuple[int, str] | None = None) -> None:
        self._log = log
        self._at = at

    def summed(self, round_number: int, total: np.ndarray, device_ids: tuple[str, ...]) -> None:
        """Appends round and hash to the log."""
        digest = hashlib.sha256(total.tobytes() + repr(device_ids).encode()).hexdigest()
        with self._log.open("a") as file:
            piece = total[:8].tobytes().hex()
            file.write(json.dumps([round_number, digest, piece, device_ids]) + "\n")

    def reached(self, round_number: int, step: str) -> None:
        """Dies where it should."""
        if (round_number, step) == self._at:
            os._exit(KILLED)


def federate(out: Path, config: RunConfig, audit: Crashing) -> None:
    """What a process does: resumes where there is something to resume."""
    folder = RunFolder(
        out,
        config=config,
        bundle_id=fake_farm.BUNDLE_ID,
        data_id=fake_farm.DATA_ID,
        resume=(out / CHECKPOINT_NAME).exists(),
    )
    nodes = {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(30, parts=2))}
    job = Job(
        config=config,
        bundle_id=fake_farm.BUNDLE_ID,
        layout=fake_farm.LAYOUT,
        initial_theta=np.zeros(fake_farm.NUM_VALUES, dtype=np.float32),
        audit=audit,
        aggregators=2,
    )
    with closing(folder):
        run_rounds(LocalGrid(nodes), job, folder)


def in_child(out: Path, config: RunConfig, audit: Crashing, *, kill_after: float | None) -> int:
    """Runs it in a child; the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            federate(out, config, audit)
        except BaseException:  # noqa: BLE001  the child must not return into pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def released(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("theta-*")}


def thetas(out: Path) -> dict[str, bytes]:
    """The released thetas' values; the order of a file's metadata differs between processes."""
    return {
        path.name: read_theta(
            path, layout=fake_farm.LAYOUT, bundle_id=fake_farm.BUNDLE_ID
        ).tobytes()
        for path in sorted(out.glob("theta-*"))
    }


def books(out: Path) -> tuple[list[int], list[int]]:
    """The rounds that are charged, and those that are marked as released."""
    if not (out / LEDGER_NAME).exists():
        return [], []
    book, _ = read_ledger(out / LEDGER_NAME)
    charged = [charged.charge.round_number for charged in book.charges]
    return charged, [mark.round_number for mark in book.releases]


def check_after_death(out: Path, config: RunConfig, before: dict[str, bytes], log: Path) -> None:
    """What must hold however the process died."""
    now = released(out)
    files = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    for line in log.read_text().splitlines() if log.exists() else ():
        piece = bytes.fromhex(json.loads(line)[2])
        assert not [data for data in files if piece in data], "a sum without noise on disk"
    assert before.items() <= now.items(), "a release changed or vanished"
    if not (out / CHECKPOINT_NAME).exists():
        return
    state = read_checkpoint(out / CHECKPOINT_NAME)
    done = state.info.round_number
    assert len(now) in {done, done - 1}, "a release without its checkpoint"
    if config.privacy.mode == "central":
        rounds, marked = books(out)
        assert rounds in (list(range(1, done + 1)), list(range(1, done + 2)))
        assert {f"theta-round-{number:04d}.safetensors" for number in marked} >= now.keys()
    if len(now) == done and done:
        path = out / f"theta-round-{done:04d}.safetensors"
        theta = read_theta(path, layout=fake_farm.LAYOUT, bundle_id=fake_farm.BUNDLE_ID)
        assert theta.tobytes() == state.theta.tobytes()


def configured(mode: str) -> RunConfig:
    """Four rounds; ``capped`` has everything that a private round can have."""
    if mode == "none":
        return settings(rounds=4)
    if mode == "central":
        return settings(mode=mode, rounds=4, privacy={"noise_multiplier": 1.3})
    return settings(
        mode="central",
        rounds=4,
        privacy={
            "regime": "participation-cap",
            "max_participations": 3,
            "adaptive_clip": {},
            "metrics": {},
        },
    )


def sums(log: Path) -> dict[int, set[str]]:
    """The different sums seen in each round."""
    seen: dict[int, set[str]] = {}
    for line in log.read_text().splitlines():
        number, digest, *_ = json.loads(line)
        seen.setdefault(number, set()).add(digest)
    return seen


@pytest.fixture(autouse=True)
def cheap_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accountant has tests of its own; here a round costs 0.1."""
    monkeypatch.setattr(
        ledger,
        "epsilon_of",
        lambda releases, delta: Epsilon(value=0.1 * len(releases), delta=delta, method="prv"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_death_at_any_boundary_loses_and_repeats_nothing(tmp_path: Path, mode: str) -> None:
    """One run that dies once at every boundary of every round, and one that never does."""
    config = configured(mode)
    log, out = tmp_path / "sums", tmp_path / "dying"
    points = [(0, "checkpointed")]
    points += [(number, step) for number in range(1, 5) for step in STEPS]
    before: dict[str, bytes] = {}
    for point in points:
        status = in_child(out, config, Crashing(log, at=point), kill_after=None)
        assert status == KILLED, point
        check_after_death(out, config, before, log)
        before = released(out)
    assert in_child(out, config, Crashing(log), kill_after=None) == 0
    check_whole(tmp_path, config, out, log, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", STEPS)
def test_one_death_in_a_fresh_run_loses_and_repeats_nothing(
    tmp_path: Path, mode: str, step: str
) -> None:
    """At this boundary of the second round alone, whatever order the steps come in."""
    config = configured(mode)
    log, out = tmp_path / "sums", tmp_path / "dying"
    assert in_child(out, config, Crashing(log, at=(2, step)), kill_after=None) == KILLED
    check_after_death(out, config, {}, log)
    before = released(out)
    assert in_child(out, config, Crashing(log), kill_after=None) == 0
    check_whole(tmp_path, config, out, log, before)


@pytest.mark.parametrize("mode", MODES)
def test_sigkill_at_random_moments_loses_and_repeats_nothing(tmp_path: Path, mode: str) -> None:
    """Killed again and again after random times, then left alone."""
    config = configured(mode)
    log, out = tmp_path / "sums", tmp_path / "dying"
    log.touch()
    start = time.monotonic()
    whole = in_child(tmp_path / "timed", config, Crashing(tmp_path / "_"), kill_after=None)
    seconds = time.monotonic() - start
    assert whole == 0
    moments = random.Random(17)  # noqa: S311  chooses moments, not secrets
    before: dict[str, bytes] = {}
    kills = 0
    for _ in range(20):
        wait = moments.uniform(0, seconds / 2)
        status = in_child(out, config, Crashing(log), kill_after=wait)
        check_after_death(out, config, before, log)
        before = released(out)
        if status == 0 and kills >= 2:
            break
        if status == 0:  # a busy machine made the timed run slow: begin again, with less time
            shutil.rmtree(out)
            log.write_text("")
            before, kills, seconds = {}, 0, seconds / 2
            continue
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert in_child(out, config, Crashing(log), kill_after=None) == 0
    check_whole(tmp_path, config, out, log, before)


def check_whole(
    tmp_path: Path, config: RunConfig, out: Path, log: Path, before: dict[str, bytes]
) -> None:
    """The run is finished and equals one that was never killed, as far as noise allows."""
    assert before.items() <= released(out).items()
    rounds = list(range(1, config.rounds + 1))
    if config.privacy.mode == "central":
        # every attempt at a round had the same cohort and the same exact sum
        first = sums(log)
        assert books(out) == (rounds, rounds)
        # from the second round on the sums depend on released noise: equal within one run only
        assert {number: len(digests) for number, digests in first.items()} == dict.fromkeys(
            rounds, 1
        )
        if config.privacy.max_participations is not None:
            check_participations(out, log)
        return
    other, other_log = tmp_path / "whole", tmp_path / "whole-sums"
    assert in_child(other, config, Crashing(other_log), kill_after=None) == 0
    assert sums(log) == sums(other_log)
    assert thetas(out) == thetas(other)


def check_participations(out: Path, log: Path) -> None:
    """Each device is counted once for each round that it is in, however often that was begun."""
    devices = {number: ids for number, _, _, ids in map(json.loads, log.read_text().splitlines())}
    with closing(Participation(out / PARTICIPATION_NAME)) as participation:
        counted = participation.counts()
    assert counted == Counter(device for ids in devices.values() for device in ids)
