"""Charges: once per round, durable, and never past the budget."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from carpool.errors import PrivacyError
from carpool_server.ledger import Charge, Ledger
from carpool_server.privacy import epsilon_spent

FIRST = Charge(round_number=1, noise_multiplier=1.0, sampling_rate=0.1, clip_norm=0.5)
SECOND = dataclasses.replace(FIRST, round_number=2)


def opened(path: Path, *, run_id: str = "r", epsilon: float = 50.0) -> Ledger:
    return Ledger(path, run_id=run_id, epsilon=epsilon, delta=1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_a_round_is_charged_once_however_often_it_is_done(path: Path) -> None:
    """Across closing and opening too; what it returns is what the accountant says."""
    with closing(opened(path)) as ledger:
        first = ledger.charge(FIRST)
        assert ledger.charge(FIRST) == first
    with closing(opened(path)) as ledger:
        assert ledger.charge(FIRST) == first
        second = ledger.charge(SECOND)
        assert ledger.charges() == [FIRST, SECOND]
    assert first == epsilon_spent([(1.0, 0.1)], delta=1e-5)
    assert second == epsilon_spent([(1.0, 0.1)] * 2, delta=1e-5)


def test_a_charge_past_the_budget_is_refused_and_not_written(path: Path) -> None:
    """Refused again by whoever asks again."""
    first = epsilon_spent([(1.0, 0.1)], delta=1e-5)
    for _ in range(2):
        with closing(opened(path, epsilon=first + 0.01)) as ledger:
            ledger.charge(FIRST)
            with pytest.raises(PrivacyError) as caught:
                ledger.charge(SECOND)
            assert ledger.charges() == [FIRST]
    both = epsilon_spent([(1.0, 0.1)] * 2, delta=1e-5)
    assert str(caught.value) == (
        f"{path}: round 2 would bring epsilon to {both:.3f} at delta 1e-05; the budget is "
        f"{first + 0.01:g}. Nothing was released."
    )


def test_another_charge_for_a_charged_round_is_refused(path: Path) -> None:
    """Less noise after the fact is not the same round."""
    other = dataclasses.replace(FIRST, noise_multiplier=0.5)
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        with pytest.raises(PrivacyError) as caught:
            ledger.charge(other)
    assert str(caught.value) == f"{path}: expected the charge {FIRST}, got {other}."


def test_another_runs_ledger_is_refused(path: Path) -> None:
    """Both runs are named."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
    with pytest.raises(PrivacyError) as caught:
        opened(path, run_id="other")
    assert str(caught.value) == (
        f"{path}: expected charges of run other, got those of r. Restore the ledger that belongs "
        "to this run."
    )


def test_a_damaged_ledger_is_refused(path: Path) -> None:
    """Without it nothing can be said about what was spent."""
    path.write_bytes(b"no database" * 100)
    with pytest.raises(PrivacyError) as caught:
        opened(path)
    assert str(caught.value) == (
        f"{path}: expected the run's ledger, got: file is not a database. Without it nothing can "
        "be said about what was spent; do not release more of this population's data."
    )


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_ledger_that_lacks_or_runs_ahead_of_the_checkpoint_is_refused(
    path: Path, rounds: int
) -> None:
    """A lost ledger is no empty one; a charge for the round under way is as it should be."""
    with closing(opened(path)) as ledger:
        for number in range(1, rounds + 1):
            ledger.charge(dataclasses.replace(FIRST, round_number=number))
        with pytest.raises(PrivacyError) as caught:
            ledger.check_covers(1)
        ledger.check_covers(max(rounds - 1, 0))
        ledger.check_covers(rounds)
    assert str(caught.value) == (
        f"{path}: expected a charge for every round up to 1, the checkpoint's, and at most one "
        f"more, got charges for {list(range(1, rounds + 1))}. Restore the ledger that belongs to "
        "this run."
    )


def test_charges_are_flushed_to_disk(path: Path) -> None:
    """SQLite's synchronous is EXTRA (3) on the ledger's connection, and the file is whole."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        with closing(sqlite3.connect(path)) as reader:
            assert reader.execute("SELECT round, noise_multiplier FROM charges").fetchall() == [
                (1, 1.0)
            ]
