"""What releases have cost, on disk before any of them leaves."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from carpool.errors import PrivacyError
from carpool_server.privacy import epsilon_spent

LEDGER_NAME = "ledger.sqlite"

_CHARGES = """
CREATE TABLE IF NOT EXISTS charges (
    round INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    clip_norm REAL NOT NULL,
    delta REAL NOT NULL,
    epsilon_after REAL NOT NULL,
    charged_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT
"""

_RELEASES = "CREATE TABLE IF NOT EXISTS releases (round INTEGER PRIMARY KEY) STRICT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Charge:
    """One round's price.

    Attributes:
        round_number: 1 or more.
        noise_multiplier: z: standard deviation of the noise over the clip.
        sampling_rate: q.
        clip_norm: C, in theta's units.
    """

    round_number: int
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float


class Ledger:
    """The charges of one run: SQLite, flushed to disk before ``charge`` returns.

    Args:
        path: the file; made where it is missing.
        run_id: whose charges these are.
        epsilon: the budget.
        delta: its delta.

    Raises:
        PrivacyError: the file cannot be read, or holds another run's charges.
    """

    def __init__(self, path: Path, *, run_id: str, epsilon: float, delta: float) -> None:
        self._path = path
        self._run_id = run_id
        self._epsilon = epsilon
        self._delta = delta
        self._connection = sqlite3.connect(path, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode = DELETE")
            # EXTRA: the journal's removal is durable too, else it could come back and undo a charge
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.execute(_CHARGES)
            self._connection.execute(_RELEASES)
            owners = [row[0] for row in self._rows("SELECT DISTINCT run_id FROM charges")]
        except sqlite3.DatabaseError as error:
            self.close()
            raise PrivacyError(
                f"{path}: expected the run's ledger, got: {error}. Without it nothing can be "
                "said about what was spent; do not release more of this population's data."
            ) from error
        if owners and owners != [run_id]:
            self.close()
            raise PrivacyError(
                f"{path}: expected charges of run {run_id}, got those of {', '.join(owners)}. "
                "Restore the ledger that belongs to this run."
            )

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def charges(self) -> list[Charge]:
        """All charges, by round."""
        rows = self._rows(
            "SELECT round, noise_multiplier, sampling_rate, clip_norm FROM charges ORDER BY round"
        )
        return [
            Charge(round_number=r, noise_multiplier=z, sampling_rate=q, clip_norm=c)
            for r, z, q, c in rows
        ]

    def charge(self, charge: Charge) -> float:
        """Writes a round's charge, once.

        Guarantees: on return it is durable. A round that is charged already is not charged
        again, so a round that is done again after a crash costs once: nothing of its first
        attempt was released.

        Returns:
            Epsilon spent with it, at the ledger's delta.

        Raises:
            PrivacyError: the charge would pass the budget, or the round is charged otherwise
                already. Nothing was written.
        """
        before = self.charges()
        known = {c.round_number: c for c in before}.get(charge.round_number)
        if known is not None and known != charge:
            raise PrivacyError(f"{self._path}: expected the charge {known}, got {charge}.")
        charges = before if known else [*before, charge]
        pairs = ((c.noise_multiplier, c.sampling_rate) for c in charges)
        epsilon = epsilon_spent(pairs, delta=self._delta)
        if known is None:
            if epsilon > self._epsilon:
                raise PrivacyError(
                    f"{self._path}: round {charge.round_number} would bring epsilon to "
                    f"{epsilon:.3f} at delta {self._delta:g}; the budget is {self._epsilon:g}. "
                    "Nothing was released."
                )
            self._connection.execute(
                "INSERT INTO charges (round, run_id, noise_multiplier, sampling_rate, "
                "clip_norm, delta, epsilon_after) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    charge.round_number,
                    self._run_id,
                    charge.noise_multiplier,
                    charge.sampling_rate,
                    charge.clip_norm,
                    self._delta,
                    epsilon,
                ),
            )
        return epsilon

    def mark_released(self, round_number: int) -> None:
        """Writes, durably, that a round leaves now; again changes nothing.

        So a checkpoint from before it, put back, cannot release the round a second time with
        other noise under one charge.
        """
        self._connection.execute(
            "INSERT OR IGNORE INTO releases (round) VALUES (?)", (round_number,)
        )

    def check_covers(self, round_number: int) -> None:
        """Refuses to go on where released rounds are missing from ledger or checkpoint.

        Raises:
            PrivacyError: names what was expected and found.
        """
        rounds = [charge.round_number for charge in self.charges()]
        expected = list(range(1, round_number + 1))
        if rounds not in (expected, [*expected, round_number + 1]):
            raise PrivacyError(
                f"{self._path}: expected a charge for every round up to {round_number}, the "
                f"checkpoint's, and at most one more, got charges for {rounds}. Restore the "
                "ledger that belongs to this run."
            )
        ((released,),) = self._rows("SELECT MAX(round) FROM releases")
        if released is not None and released > round_number:
            raise PrivacyError(
                f"{self._path}: expected no release after round {round_number}, the checkpoint's, "
                f"got one of round {released}. Released again it would have other noise and cost "
                "twice; restore the newest checkpoint."
            )

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(self._connection.execute(query)) as cursor:
            return cursor.fetchall()
