"""The real command: Flower's engine, Ray's workers, the real small bundle, real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from carpool.bundle import Bundle
from carpool.data.dataset import Dataset, Split, write_dataset
from carpool.theta import read_theta
from carpool_server.checkpoint import CHECKPOINT_NAME, read_checkpoint
from carpool_server.privacy.accounting import rounded_up
from carpool_server.privacy.ledger import LEDGER_NAME, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MARK = "CARPOOL_TEST_RUN"
ROUNDS = 12
SETTINGS = f"""
rounds = {ROUNDS}
seed = 3
[privacy]
mode = "none"
clip_norm = 0.5
[cohort]
expected_size = 3
quorum = 1.0
deadline_seconds = 300
[local]
learning_rate = 0.1
epochs = 1
max_examples = 2
[server]
kind = "adam"
learning_rate = 0.03
"""
CENTRAL = (
    *("--privacy", "central", "--set", "privacy.regime=poisson"),
    *("--set", "privacy.epsilon=50", "--set", "privacy.delta=1e-3"),
)


class Farm:
    """Runs the command on a few clients, and leaves no process behind."""

    def __init__(self, bundle: Path, data: Path, folder: Path) -> None:
        self.bundle, self.data, self.folder = bundle, data, folder
        self.mark = uuid.uuid4().hex
        (folder / "settings.toml").write_text(SETTINGS)

    def start(self, out: str, *options: str) -> subprocess.Popen[str]:
        """The command as a user starts it, marked so that all it starts can be found."""
        settings = self.folder / "settings.toml"
        arguments = [self.bundle, self.data, self.folder / out, "--settings", settings]
        return subprocess.Popen(
            [sys.executable, "-c", "from carpool.cli import main; main()", "federate"]
            + [str(a) for a in arguments]
            + list(options),
            env=os.environ | {MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a SIGINT of ours must not reach pytest
        )

    def run(self, out: str, *options: str) -> str:
        """Runs it to its end; its output."""
        process = self.start(out, *options)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    def reap(self) -> int:
        """Ends what a killed command left: Ray's daemons and workers, by their mark."""
        found = [p for p in psutil.process_iter() if self._is_ours(p)]
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=10)
        return len(found)

    def leaves_nothing(self) -> bool:
        """Whether all that was started has gone by itself, given half a minute."""
        for _ in range(60):
            if not any(self._is_ours(process) for process in psutil.process_iter()):
                return True
            time.sleep(0.5)
        return False

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False

    def theta(self, out: str, number: int = ROUNDS) -> bytes:
        """A released theta's values."""
        bundle = Bundle.open(self.bundle)
        path = self.folder / out / f"theta-round-{number:04d}.safetensors"
        return read_theta(path, layout=bundle.manifest.layout, bundle_id=bundle.id).tobytes()

    def rounds_done(self, out: str) -> int:
        """Rounds in the checkpoint, or -1."""
        path = self.folder / out / CHECKPOINT_NAME
        return read_checkpoint(path).info.round_number if path.exists() else -1

    def wait_for_round(self, process: subprocess.Popen[str], out: str, number: int) -> None:
        """Until the round is checkpointed, or the command has ended."""
        while process.poll() is None and self.rounds_done(out) < number:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def few_clients(attack_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training clients of the real set, with at most four examples each."""
    whole = Dataset.open(attack_set)
    names = whole.split.train[:8]
    held = [whole.split.validation[0], whole.split.test[0]]
    examples = [e for name in [*names, *held] for e in whole.examples[name][:4]]
    split = Split(seed=0, train=names, validation=(held[0],), test=(held[1],))
    folder = tmp_path_factory.mktemp("few") / "data"
    write_dataset(folder, documents=whole.documents, examples=examples, split=split)
    return folder


@pytest.fixture(scope="module")
def farm(
    small_bundle: Path, few_clients: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Farm]:
    found = Farm(small_bundle, few_clients, tmp_path_factory.mktemp("runs"))
    yield found
    found.reap()


@pytest.fixture(scope="module")
def whole(farm: Farm) -> str:
    """A run that nobody disturbed."""
    return farm.run("whole")


def test_the_command_says_where_theta_is_and_nothing_else(farm: Farm, whole: str) -> None:
    """One line per round at most, then the path; Flower's and Ray's talk is in the run's log."""
    path = farm.folder / "whole" / f"theta-round-{ROUNDS:04d}.safetensors"
    lines = whole.splitlines()
    assert lines[-1] == f"theta: {path}"
    assert all(line.startswith("Federated rounds: ") for line in lines[:-1])
    assert f"Federated rounds: {ROUNDS}/{ROUNDS} loss " in whole
    assert "run_simulation" in (farm.folder / "whole" / "flower.log").read_text()
    info = read_checkpoint(farm.folder / "whole" / CHECKPOINT_NAME).info
    assert [record.count for record in info.history] == [record.drawn for record in info.history]
    assert sum(record.drawn or 0 for record in info.history) > ROUNDS
    assert farm.leaves_nothing()


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("aggregators", [1, 5])
def test_aggregators_change_no_bit(farm: Farm, aggregators: int) -> None:
    """One and five give the theta of two."""
    out = f"aggregators-{aggregators}"
    farm.run(out, "--set", f"simulation.aggregators={aggregators}")
    assert farm.theta(out) == farm.theta("whole")


@pytest.mark.usefixtures("whole")
def test_ctrl_c_and_sigkill_and_resume_end_in_the_same_theta(farm: Farm) -> None:
    """Stopped once, killed twice at random moments, resumed: not one bit differs."""
    moments = random.Random(11)  # noqa: S311  chooses moments, not secrets
    process = farm.start("killed")
    farm.wait_for_round(process, "killed", moments.randint(0, 2))
    time.sleep(moments.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert farm.reap() > 0

    process = farm.start("killed", "--resume")
    farm.wait_for_round(process, "killed", farm.rounds_done("killed") + 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == (
        f"{farm.folder / 'killed'}: stopped as asked; resume it with --resume."
    )
    assert farm.leaves_nothing()

    done = farm.rounds_done("killed")
    process = farm.start("killed", "--resume")
    farm.wait_for_round(process, "killed", done + 1)
    time.sleep(moments.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    farm.reap()
    assert process.returncode == -signal.SIGKILL

    farm.run("killed", "--resume")
    for number in range(1, ROUNDS + 1):
        assert farm.theta("killed", number) == farm.theta("whole", number)
    again = farm.run("killed", "--resume")
    assert "the run is finished already; nothing was left to do." in again


def test_central_privacy_charges_and_releases_once_through_a_kill(farm: Farm) -> None:
    """The ledger has every round once; neither key nor cohort leaves the checkpoint."""
    process = farm.start("central", *CENTRAL)
    farm.wait_for_round(process, "central", 1)
    process.send_signal(signal.SIGKILL)
    first, _ = process.communicate()
    farm.reap()
    theta = farm.theta("central", 1) if farm.rounds_done("central") > 1 else None
    output = farm.run("central", *CENTRAL, "--resume")
    if theta is not None:
        assert farm.theta("central", 1) == theta

    folder = farm.folder / "central"
    book, torn = read_ledger(folder / LEDGER_NAME)
    assert torn == 0
    rounds = list(range(1, ROUNDS + 1))
    assert [charged.charge.round_number for charged in book.charges] == rounds
    assert [mark.round_number for mark in book.releases] == rounds
    spent = book.charges[-1].epsilon
    info = read_checkpoint(folder / CHECKPOINT_NAME).info
    assert info.history[-1].epsilon == spent <= 50
    assert (
        f"privacy: epsilon {rounded_up(spent, 2)} at delta 0.001 was spent; unit: one device, all "
        "of its text"
    ) in output
    key = info.sampling_key
    assert key is not None
    told = first + output + (folder / "flower.log").read_text()
    told += json.dumps([record.model_dump() for record in info.history])
    names = Dataset.open(farm.data).split.train
    assert not [secret for secret in (key, *names) if secret in told]
    assert {record.count for record in info.history} == {None}
