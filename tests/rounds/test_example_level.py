"""Mode example_level in whole rounds: devices add the noise, and each of them counts."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import fake_farm
import numpy as np
import pytest
from fake_farm import FakeAggregator, answer, contribution_to
from flwr.app import Message
from real_devices import run_apps
from round_kit import RunHere, Witness, settings

from carpool.config import RunConfig
from carpool.data.dataset import Dataset
from carpool.errors import RoundFailed
from carpool.protocol import RoundTask
from carpool.rdp import epsilon_of_steps
from carpool_server.participation import PARTICIPATION_NAME, Participation
from carpool_server.privacy.ledger import LEDGER_NAME
from carpool_server.statement import privacy_statement
from carpool_sim.aggregator import Sources

STEPS, CAP = 2, 2


def config(*, rounds: int = 3, epsilon: float = 6.0, **cohort: float) -> RunConfig:
    base = settings(
        rounds=rounds, cohort={"expected_size": 6.0, "quorum": 0.0, **cohort}
    ).model_dump()
    base["privacy"] = {
        "mode": "example_level",
        "clip_norm": 0.5,
        "epsilon": epsilon,
        "delta": 1e-3,
        "max_participations": CAP,
    }
    base["local"] = {
        "learning_rate": 0.05,
        "steps": STEPS,
        "batch_size": 2,
        "example_clip_norm": 0.5,
    }
    return RunConfig.model_validate(base)


def counts(folder: Path) -> dict[str, int]:
    with closing(Participation(folder / PARTICIPATION_NAME)) as participation:
        return participation.counts()


def test_real_devices_train_under_their_own_noise_and_are_counted(
    sources: Sources, tmp_path: Path
) -> None:
    """No ledger, no loss; who was asked is counted, and the sums of two runs differ."""
    first, second = Witness(), Witness()
    result = run_apps(sources, tmp_path / "first", config(rounds=2), parts=2, witness=first)
    run_apps(sources, tmp_path / "second", config(rounds=2), parts=2, witness=second)
    assert first.devices == second.devices  # the draw is no secret here
    assert any(len(devices) > 1 for devices in first.devices.values())
    for number, total in first.sums.items():
        assert (total != second.sums[number]).any()
    drawn = Counter(device for devices in first.devices.values() for device in devices)
    counted = counts(tmp_path / "first")
    assert all(counted[device] >= times for device, times in drawn.items())
    assert max(counted.values()) <= CAP
    assert not (tmp_path / "first" / LEDGER_NAME).exists()
    assert [record.mean_loss for record in result.info.history] == [None, None]
    assert privacy_statement(result.info) == [
        (
            "privacy: each device keeps epsilon 6 at delta 0.001 for each of its own examples, "
            "over at most 2 rounds, against whoever sees its updates, this server included; unit: "
            "one example of one device; neighbouring: add or remove it, where the number of "
            "examples is known."
        )
    ]


def test_a_devices_noise_is_what_its_own_examples_need(sources: Sources, tmp_path: Path) -> None:
    """The sum of one device's steps is as noisy as its own accountant says it must be."""
    examples = Dataset.open(Path(sources.data)).part("train")
    updates: dict[str, list[np.ndarray]] = {}
    for run in range(12):
        witness = Witness()
        run_apps(sources, tmp_path / str(run), config(rounds=1), parts=1, witness=witness)
        updates.setdefault("sum", []).append(witness.sums[1].astype(np.float64))
    devices = witness.devices[1]
    spread = np.std(np.array(updates["sum"]) * 0.5 / 2**30, axis=0, ddof=1)
    expected = 0.0
    for device in devices:
        rate = min(1.0, 2 / len(examples[device]))
        # the least noise at which CAP participations of STEPS steps keep the budget
        grid = np.arange(0.3, 40, 0.001)
        z = next(
            z
            for z in grid
            if epsilon_of_steps(
                noise_multiplier=float(z), sampling_rate=rate, steps=STEPS * CAP, delta=1e-3
            )
            <= 6.0
        )
        expected += STEPS * (0.05 * z * 0.5 / 2) ** 2  # learning rate x z x C / batch
    found = float(np.median(spread))
    assert found == pytest.approx(expected**0.5, rel=0.2)


def test_a_device_is_asked_once_a_round_and_every_attempt_counts(
    run_here: RunHere, tmp_path: Path
) -> None:
    """Below the quorum the round waits, and asks nobody again: new noise would cost again."""
    silent = FakeAggregator(fake_farm.devices(30), lie=lambda _message, _task: None)
    waiting = config(quorum=0.5, deadline_seconds=0.1, extensions=2)
    for attempt in (1, 2):
        with pytest.raises(RoundFailed):
            run_here({10: silent}, config=waiting, resume=attempt > 1)
        assert len(silent.tasks) == attempt
        asked = silent.tasks[-1].device_ids
        assert counts(tmp_path / "run") == dict.fromkeys(asked, attempt)
        told = silent.tasks[-1].participations
        assert told == dict.fromkeys(asked, attempt - 1)


def test_devices_at_their_cap_are_not_asked(run_here: RunHere, tmp_path: Path) -> None:
    """The run ends where fewer are left than a round expects."""

    def refuse(message: Message, task: RoundTask) -> Message:
        refused = dict.fromkeys(task.header.device_ids[1:], "diverged")
        return answer(message, contribution_to(task, refused=refused))

    node = FakeAggregator(fake_farm.devices(30), lie=refuse)
    result = run_here({10: node}, config=config(rounds=60))
    assert result.info.ended == "participation-cap"
    asked = Counter(device for task in node.tasks for device in task.device_ids)
    assert max(asked.values()) == CAP
    assert counts(tmp_path / "run") == asked  # a refused device has trained, so it counts too
