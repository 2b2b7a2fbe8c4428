"""An append-only file of JSON lines, each bound to the one before it by a hash."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from carpool.errors import PrivacyError
from carpool.files import sync_directory
from carpool.schema import Model, Sha256, canonical_bytes, canonical_id, describe

FIRST = "0" * 64
"""What the first line names as the hash before it."""


class Link(Model):
    """One line.

    Attributes:
        number: 1 for the first line.
        entry: what it says.
        previous: hash of the line before.
        hash: SHA-256 of the canonical JSON (RFC 8785) of the other three.
    """

    number: Annotated[int, Field(ge=1)]
    entry: dict[str, Any]
    previous: Sha256
    hash: Sha256

    @classmethod
    def after(cls, links: list[Link], entry: dict[str, Any]) -> Link:
        """The next line of a chain."""
        previous = links[-1].hash if links else FIRST
        number = len(links) + 1
        return cls(
            number=number,
            entry=entry,
            previous=previous,
            hash=_hash(number, entry, previous),
        )


def read_chain(path: Path) -> tuple[list[Link], int]:
    """Reads and verifies a file.

    Guarantees: the lines are those that were written, in order, with none changed, left out
    in between or put in. Lines cut off at the end leave a valid chain: whoever must notice
    keeps the last hash elsewhere (a run's checkpoint does).

    Returns:
        The lines, and the bytes of a last one that was not finished: a process was killed
        while it wrote, and nothing it stood for was acknowledged.

    Raises:
        PrivacyError: names the file, the line, what was expected and what was found.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrivacyError(
            f"{path}: expected a privacy ledger, got: {error.strerror}. Without it nothing can be "
            "said about what was spent; do not release more of this population's data."
        ) from error
    *whole, torn = data.split(b"\n")
    links: list[Link] = []
    for number, line in enumerate(whole, start=1):
        links.append(_verified(line, number, links, path))
    return links, len(torn)


class Chain:
    """A chain that one process at a time adds to. Close it after use.

    Attributes:
        links: all lines.

    Args:
        path: the file; made, for its owner alone, where it is missing.

    Raises:
        PrivacyError: another process has it open, or it is no intact chain.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._failing():
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._lock()
            self.links, torn = read_chain(path)
            self._size = os.fstat(self._file).st_size - torn
            if torn:  # never acknowledged
                self._cut()
            with self._failing():
                sync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have the file."""
        os.close(self._file)

    def append(self, entry: dict[str, Any]) -> Link:
        """Adds a line.

        Guarantees: on return it is on disk. Killed at any moment, the file has the whole line,
        or a torn one that the next opening removes.

        Raises:
            PrivacyError: it could not be written; the file is as it was.
        """
        link = Link.after(self.links, entry)
        line = canonical_bytes(link.model_dump(mode="json")) + b"\n"
        try:
            with self._failing():
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(None, f"only {written} of {len(line)} bytes were written")
                os.fsync(self._file)
        except PrivacyError:
            self._cut()
            raise
        self._size += len(line)
        self.links.append(link)
        return link

    def _cut(self) -> None:
        with self._failing():
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: expected a ledger that no process is charging, but one is. Wait "
                "for it, or stop it first."
            ) from error

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: expected a ledger that can be written, got: {error.strerror}. "
                "Nothing was released."
            ) from error


def _verified(line: bytes, number: int, before: list[Link], path: Path) -> Link:
    where = f"{path}: line {number}"
    restore = "The ledger was changed or damaged; restore the one that was written."
    try:
        link = Link.model_validate(json.loads(line))
        found_hash = _hash(link.number, link.entry, link.previous)
    except ValidationError as error:
        raise PrivacyError(f"{where}: {describe(error, Link)} {restore}") from error
    except ValueError as error:
        raise PrivacyError(f"{where}: expected canonical JSON, got: {error}. {restore}") from error
    previous = before[-1].hash if before else FIRST
    for name, expected, found in (
        ("number", number, link.number),
        ("previous hash", previous, link.previous),
        ("hash", found_hash, link.hash),
    ):
        if found != expected:
            raise PrivacyError(f"{where}: expected the {name} {expected}, got {found}. {restore}")
    return link


def _hash(number: int, entry: dict[str, Any], previous: str) -> str:
    return canonical_id({"number": number, "entry": entry, "previous": previous})
