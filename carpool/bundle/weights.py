"""A program whose weights came as int8 becomes the one that runs: once, where it is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from carpool.bundle.manifest import PackedWeights, WeightSegment
from carpool.errors import BundleError
from carpool.files import atomic_file, sha256_of_file

_CHUNK_BYTES = 1 << 22


def expand_once(packed_path: Path, program_path: Path, packed: PackedWeights) -> None:
    """Makes the program from its packed form, unless it is there already.

    Guarantees: on return ``program_path`` has the size and SHA-256 that ``packed`` states. It
    appears whole or not at all; processes that do this at the same time do not disturb each other.

    Args:
        packed_path: the file that was shipped; its own SHA-256 is checked elsewhere.
        program_path: where the program shall be; its folder must exist.
        packed: describes both.

    Raises:
        BundleError: what came out is another program, or nothing can be written there.
    """
    if _is_there(program_path, packed):
        return
    digest = hashlib.sha256()
    try:
        with packed_path.open("rb") as source, atomic_file(program_path) as target:
            for chunk in expanded(source, packed):
                digest.update(chunk)
                target.write(chunk)
            if digest.hexdigest() != packed.program.sha256:
                raise BundleError(
                    f"{packed_path}: expected to expand to SHA-256 {packed.program.sha256}, got "
                    f"{digest.hexdigest()}. Copy the bundle again."
                )
    except OSError as error:
        raise BundleError(
            f"{program_path}: expected room for {packed.program.bytes} bytes in a folder that can "
            f"be written to, because the weights of {packed_path.name} are expanded there once; "
            f"got: {error.strerror}. Copy the bundle to such a folder."
        ) from error


def expanded(source: BinaryIO, packed: PackedWeights) -> Iterator[bytes]:
    """The program's bytes in order, in pieces of a few megabytes.

    Args:
        source: the shipped file, at its start.
        packed: its segments.

    Raises:
        BundleError: the file ends too early.
    """
    place = 0
    for segment in packed.segments:
        yield from _copied(source, segment.offset - place)
        yield from _multiplied(source, segment)
        place = segment.end
    yield from _copied(source, packed.program.bytes - place)


def _is_there(path: Path, packed: PackedWeights) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == packed.program.bytes
        and sha256_of_file(path) == packed.program.sha256
    )


def _copied(source: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        yield _read(source, min(count, _CHUNK_BYTES))
        count -= min(count, _CHUNK_BYTES)


def _multiplied(source: BinaryIO, segment: WeightSegment) -> Iterator[bytes]:
    scales: NDArray[np.float32] = np.frombuffer(_read(source, 4 * segment.channels), dtype="<f4")
    at_once = max(1, _CHUNK_BYTES // (4 * segment.columns))
    for row in range(0, segment.rows, at_once):
        count = min(at_once, segment.rows - row)
        values = np.frombuffer(_read(source, count * segment.columns), dtype=np.int8)
        factors = scales[row : row + count, None] if segment.scale_per == "row" else scales
        weights = values.reshape(count, segment.columns).astype("<f4") * factors
        yield weights.astype("<f4", copy=False).tobytes()


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise BundleError(
            f"{source.name}: expected {count} more bytes, got {len(data)}. Copy the bundle again."
        )
    return data
