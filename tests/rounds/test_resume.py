"""What a run's folder allows: starting, resuming, and nothing by accident."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from typing import get_args

import fake_farm
import pytest
from fake_farm import FakeAggregator, dealt
from round_kit import RunHere, Witness, settings

from carpool.errors import CheckpointError, ConfigError, RunStopped, ThetaError
from carpool.theta import read_theta
from carpool_server.checkpoint import CHECKPOINT_NAME, RunFolder, read_checkpoint
from carpool_server.hooks import RoundFacts, Step

NODES = {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(30, parts=2))}


class StopAfter:
    """A hook that stops the run after a round."""

    def __init__(self, round_number: int) -> None:
        self.stop = threading.Event()
        self._round_number = round_number

    def after_round(self, facts: RoundFacts) -> None:
        """Stops when it is time."""
        if facts.round_number == self._round_number:
            self.stop.set()


class Seen:
    """A hook that keeps its facts."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.facts: list[RoundFacts] = []

    def after_round(self, facts: RoundFacts) -> None:
        """Keeps them."""
        self.rounds.append(facts.round_number)
        self.facts.append(facts)


@pytest.fixture
def half_done(run_here: RunHere) -> None:
    """A run of three rounds, stopped after the first."""
    stopping = StopAfter(1)
    with pytest.raises(RunStopped):
        run_here(NODES, hooks=[stopping], stop=stopping.stop)


@pytest.mark.usefixtures("half_done")
def test_a_stopped_run_ends_as_if_it_had_not_been(run_here: RunHere) -> None:
    """Theta, optimiser state and history continue where they were."""
    resumed = run_here(NODES, resume=True)
    whole = run_here(NODES, out="whole")
    assert resumed.theta.tobytes() == whole.theta.tobytes()
    assert [r.round_number for r in resumed.info.history] == [1, 2, 3]
    assert [r.mean_loss for r in resumed.info.history] == [0.5] * 3


@pytest.mark.usefixtures("half_done")
def test_changed_settings_are_refused_by_name(run_here: RunHere, tmp_path: Path) -> None:
    """Each changed setting with both values."""
    other = settings(seed=6, server={"learning_rate": 0.1}, simulation={"aggregators": 5})
    with pytest.raises(ConfigError) as caught:
        run_here(NODES, resume=True, config=other)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected the settings of the run that is resumed; changed: "
        "seed: 5 -> 6; server.learning_rate: 0.03 -> 0.1. Put them back, or start a new run in "
        "another folder."
    )


@pytest.mark.usefixtures("half_done")
def test_another_simulation_is_no_changed_setting(run_here: RunHere) -> None:
    """A run may be resumed over more aggregators, and still ends in the same theta."""
    more = {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(30, parts=5))}
    config = settings(simulation={"aggregators": 5})
    resumed = run_here(more, resume=True, config=config)
    assert resumed.theta.tobytes() == run_here(NODES, out="whole").theta.tobytes()


@pytest.mark.usefixtures("half_done")
def test_another_bundle_is_refused(run_here: RunHere, tmp_path: Path) -> None:
    """With both ids."""
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES, resume=True, bundle_id="e" * 64)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected the bundle {'b' * 64} of the run that is resumed, got "
        f"{'e' * 64}. Use the same bundle, or start a new run in another folder."
    )


@pytest.mark.usefixtures("half_done")
def test_another_data_set_is_refused(run_here: RunHere, tmp_path: Path) -> None:
    """Before the aggregators are asked where it is known, and after where only they know."""
    message = (
        f"{tmp_path / 'run'}: expected the data set {'d' * 64} of the run that is resumed, got "
        f"{'f' * 64}. Use the same data set, or start a new run in another folder."
    )
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES, resume=True, data_id="f" * 64)
    assert str(caught.value) == message
    others = {10: FakeAggregator(fake_farm.devices(30), data_id="f" * 64)}
    with pytest.raises(CheckpointError) as caught:
        run_here(others, resume=True, data_id=None)
    assert str(caught.value) == message


@pytest.mark.usefixtures("half_done")
def test_starting_over_a_run_needs_resume(run_here: RunHere, tmp_path: Path) -> None:
    """Nothing is overwritten by a forgotten option."""
    before = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected a folder without a run, found checkpoint.safetensors. "
        "Add --resume to go on with it, or choose another folder."
    )
    assert (tmp_path / "run" / CHECKPOINT_NAME).read_bytes() == before


@pytest.mark.usefixtures("half_done")
def test_what_an_earlier_run_left_is_not_taken_for_a_new_runs(
    run_here: RunHere, tmp_path: Path
) -> None:
    """Its thetas have the new run's names."""
    (tmp_path / "run" / CHECKPOINT_NAME).unlink()
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected a folder without a run, found "
        "theta-round-0001.safetensors, which an earlier one left. Choose another folder."
    )


def test_another_theta_under_a_rounds_name_is_refused(run_here: RunHere, tmp_path: Path) -> None:
    """A release is compared with the checkpoint before it is called done."""
    run_here(NODES)
    run_here(NODES, out="other", config=settings(seed=6))
    last = "theta-round-0003.safetensors"
    (tmp_path / "run" / last).write_bytes((tmp_path / "other" / last).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES, resume=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run' / last}: expected this run's theta of round 3, got another one. "
        "Start a new run in another folder."
    )


def test_a_theta_that_is_not_finite_never_reaches_the_checkpoint(
    run_here: RunHere, tmp_path: Path
) -> None:
    """The run stops where it can be resumed."""
    wild = settings(server={"learning_rate": 1e39})
    with pytest.raises(ThetaError, match=r"^round 1: theta after the server's step: \d+ of "):
        run_here(NODES, config=wild)
    assert read_checkpoint(tmp_path / "run" / CHECKPOINT_NAME).info.round_number == 0
    with pytest.raises(ThetaError, match=r"^round 1: theta after"):
        run_here(NODES, config=wild, resume=True)


def test_resuming_nothing_is_refused(run_here: RunHere, tmp_path: Path) -> None:
    """A mistyped folder does not become a new run."""
    with pytest.raises(CheckpointError) as caught:
        run_here(NODES, resume=True)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected a run to resume, found no checkpoint.safetensors. "
        "Leave out --resume to start one."
    )


def test_a_finished_run_gives_its_result_and_asks_nobody(run_here: RunHere) -> None:
    """Its last hook is called again, since a kill may have kept it from ending."""
    first = run_here(NODES)
    seen, silent = Seen(), {10: FakeAggregator(("nobody",), lie=lambda _m, _t: None)}
    again = run_here(silent, resume=True, hooks=[seen])
    assert again.already_finished
    assert not first.already_finished
    assert again.theta.tobytes() == first.theta.tobytes()
    assert again.info == first.info
    assert seen.rounds == [3]


@pytest.mark.usefixtures("half_done")
def test_two_processes_cannot_have_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first goes on."""
    arguments = {
        "config": settings(),
        "bundle_id": fake_farm.BUNDLE_ID,
        "data_id": None,
        "resume": True,
    }
    held = RunFolder(tmp_path / "run", **arguments)
    with pytest.raises(CheckpointError) as caught:
        RunFolder(tmp_path / "run", **arguments)
    held.close()
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: expected a folder that no process is using, but a run is going on "
        "in it. Wait for it, or stop it first."
    )
    RunFolder(tmp_path / "run", **arguments).close()


@pytest.mark.usefixtures("half_done")
def test_half_written_files_of_a_dead_process_are_removed(
    run_here: RunHere, tmp_path: Path
) -> None:
    """They may hold a theta that was never released."""
    stray = tmp_path / "run" / ".checkpoint.safetensors.x1y2"
    stray.write_bytes(b"half")
    run_here(NODES, resume=True)
    assert not stray.exists()


def test_releases_are_thetas_of_their_round_and_bundle(run_here: RunHere, tmp_path: Path) -> None:
    """Every k-th and the last are kept; each opens only with its own bundle."""
    seen = Seen()
    result = run_here(NODES, keep_every=2, hooks=[seen])
    names = sorted(p.name for p in tmp_path.glob("run/theta-*"))
    assert names == ["theta-round-0002.safetensors", "theta-round-0003.safetensors"]
    theta = read_theta(result.theta_path, layout=fake_farm.LAYOUT, bundle_id=fake_farm.BUNDLE_ID)
    assert theta.tobytes() == result.theta.tobytes() == seen.facts[-1].theta.tobytes()
    assert seen.rounds == [1, 2, 3]


def test_hooks_get_facts_they_cannot_change(run_here: RunHere) -> None:
    """Theta is a read-only copy."""
    seen = Seen()
    run_here(NODES, hooks=[seen])
    with pytest.raises(ValueError, match="read-only"):
        seen.facts[0].theta[0] = 1
    assert seen.facts[0].record.count == seen.facts[0].record.drawn
    assert seen.facts[0].record.bytes_up > 8 * fake_farm.NUM_VALUES
    assert seen.facts[0].rounds == 3


def test_the_order_of_a_round_is_the_documented_one(run_here: RunHere) -> None:
    """Charge before noise, checkpoint before release."""
    witness = Witness()
    run_here(NODES, audit=witness, config=settings(rounds=1))
    assert witness.steps == [(0, "checkpointed"), *((1, step) for step in get_args(Step))]


@pytest.mark.usefixtures("half_done")
def test_the_checkpoint_has_settings_versions_and_ids(tmp_path: Path) -> None:
    """Enough to say what was run; public in mode none."""
    path = tmp_path / "run" / CHECKPOINT_NAME
    info = read_checkpoint(path).info
    assert info.config == settings()
    assert set(info.versions) == {"python", "carpool", "flwr", "numpy", "opacus", "dp-accounting"}
    assert (info.bundle_id, info.data_id) == (fake_farm.BUNDLE_ID, fake_farm.DATA_ID)
    assert info.sampling_key is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
