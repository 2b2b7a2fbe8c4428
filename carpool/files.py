"""Files that are either wholly there or not there at all, whatever is killed when."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from carpool.errors import FolderError

_CHUNK_BYTES = 1 << 20


def sha256_of_file(path: Path) -> str:
    """The lower-case hexadecimal SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable (POSIX: ``fsync`` on the directory)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing.

    Raises:
        FolderError: it cannot be; names the path and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"{path}: expected a folder, or a place where one can be made, got: {error.strerror}."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of ``path`` when the block ends without error.

    Guarantees: a reader or a crash sees the old bytes or the new ones; afterwards the bytes and
    the name are durable (both ``fsync``-ed). A process killed in between leaves at most a stray
    ``.NAME.*`` beside the file, never half a file.

    Args:
        path: the file; its directory must exist.
        private: readable by the owner alone (mode 0600) instead of by the usual mask.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replaces ``path`` by ``data``, as ``atomic_file`` does."""
    with atomic_file(path, private=private) as file:
        file.write(data)


@functools.cache
def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
