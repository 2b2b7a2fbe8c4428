"""In how many rounds each device is: what a participation cap is kept by."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from carpool.errors import PrivacyError

PARTICIPATION_NAME = "ledger.participation.sqlite"
"""Beside a ledger of the default name."""

_VERSION = 1

_TABLE = """
CREATE TABLE IF NOT EXISTS participation (
    device_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt TEXT NOT NULL,
    PRIMARY KEY (device_id, run_id, round, attempt)
) STRICT, WITHOUT ROWID
"""


class Participation:
    """The rounds that each device of a population is in, over all runs. Close it after use.

    A device is counted before the round that it is in is noised, and stays counted if that
    round is never released.

    Attributes:
        path: the file.

    Args:
        path: an SQLite file; made, for its owner alone, where it is missing.

    Raises:
        PrivacyError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._failing():
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, isolation_level=None)
        try:
            with self._failing():
                self._connection.execute("PRAGMA journal_mode = DELETE")
                # EXTRA: the journal's removal is durable too, else it could undo a count
                self._connection.execute("PRAGMA synchronous = EXTRA")
                self._connection.execute(_TABLE)
                self._check_version()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def counts(self, *, without: tuple[str, int] = ("", 0)) -> dict[str, int]:
        """Device id -> rounds it is in; devices in none are left out.

        Args:
            without: a run and round that does not count, where it has no attempts.
        """
        query = (
            "SELECT device_id, COUNT(*) FROM participation "
            "WHERE NOT (run_id = ? AND round = ? AND attempt = '') GROUP BY device_id"
        )
        with self._failing(), closing(self._connection.execute(query, without)) as cursor:
            return dict(cursor.fetchall())

    def sizes(self) -> dict[tuple[str, int], int]:
        """(Run, round) -> devices that were counted in it."""
        query = (
            "SELECT run_id, round, COUNT(DISTINCT device_id) FROM participation "
            "GROUP BY run_id, round"
        )
        with self._failing(), closing(self._connection.execute(query)) as cursor:
            return {(run, number): size for run, number, size in cursor.fetchall()}

    def total(self) -> int:
        """All participations, attempts included."""
        return sum(self.counts().values())

    def add(
        self, device_ids: Iterable[str], *, run_id: str, round_number: int, attempt: str = ""
    ) -> None:
        """Counts devices in a round, durably and all at once; again changes nothing.

        Args:
            device_ids: which.
            run_id: the round's run.
            round_number: 1 or more.
            attempt: tells attempts apart, where each of them costs the devices; else empty.
        """
        rows = [(device, run_id, round_number, attempt) for device in device_ids]
        with self._failing(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                "INSERT OR IGNORE INTO participation (device_id, run_id, round, attempt) "
                "VALUES (?, ?, ?, ?)",
                rows,
            )

    def _check_version(self) -> None:
        ((version,),) = self._connection.execute("PRAGMA user_version").fetchall()
        if version not in (0, _VERSION):
            raise PrivacyError(
                f"{self.path}: expected version {_VERSION}, got {version}. Use the version of "
                "carpool that wrote it."
            )
        self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"{self.path}: expected the population's participations, got: {error}. Without "
                "them no cap can be kept; restore the file."
            ) from error
