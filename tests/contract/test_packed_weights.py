"""A bundle whose weights came as int8: expanded once, to the program it states or not at all."""

from __future__ import annotations

import hashlib
import multiprocessing
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle.manifest import FileEntry, PackedWeights, WeightSegment
from carpool.errors import BundleError

SEGMENTS = (
    WeightSegment(offset=0, rows=2, columns=2, scale_per="row"),
    WeightSegment(offset=32, rows=1, columns=3, scale_per="column"),
)
SHIPPED = (
    struct.pack("<2f4b", 0.5, 4.0, 1, -2, 3, 127)
    + b"between-a-bound!"
    + struct.pack("<3f3b", 1.0, 2.0, 0.25, 5, -6, 7)
    + b"end"
)
PROGRAM = (
    struct.pack("<4f", 0.5, -1.0, 12.0, 508.0)
    + b"between-a-bound!"
    + struct.pack("<3f", 5.0, -12.0, 1.75)
    + b"end"
)
PACKED = PackedWeights(
    file="program.pte.int8",
    program=FileEntry(bytes=len(PROGRAM), sha256=hashlib.sha256(PROGRAM).hexdigest()),
    segments=SEGMENTS,
)

Make = Callable[..., Bundle]


@pytest.fixture
def make_packed(
    tmp_path: Path, fields: dict[str, Any], fill: Callable[[Path], None]
) -> Callable[..., Bundle]:
    def make(shipped: bytes = SHIPPED, packed: PackedWeights = PACKED) -> Bundle:
        fields["program"] = fields["program"].model_copy(update={"packed": packed})
        with staging_folder(tmp_path / "bundle") as staging:
            fill(staging)
            (staging / "program.pte").unlink()
            (staging / packed.file).write_bytes(shipped)
            return finish_bundle(staging, tmp_path / "bundle", fields)

    return make


def test_the_program_is_expanded_where_it_is_first_asked_for(make_packed: Make) -> None:
    """Two segments, one with a scale per row and one per column, and what is between them."""
    bundle = Bundle.open(make_packed().path)
    assert not (bundle.path / "program.pte").exists()
    assert bundle.program_path.read_bytes() == PROGRAM
    assert Bundle.open(bundle.path) == bundle


def test_a_program_that_is_there_is_not_made_again(make_packed: Make) -> None:
    """It keeps its inode."""
    bundle = make_packed()
    before = bundle.program_path.stat().st_ino
    assert bundle.program_path.stat().st_ino == before


@pytest.mark.parametrize("left", [b"", PROGRAM[:-1], PROGRAM[:-1] + b"?"])
def test_a_damaged_program_is_made_again(make_packed: Make, left: bytes) -> None:
    """Whatever was left there by whom."""
    bundle = make_packed()
    (bundle.path / "program.pte").write_bytes(left)
    assert bundle.program_path.read_bytes() == PROGRAM


def test_what_expands_to_another_program_is_refused(make_packed: Make) -> None:
    """And nothing is left behind."""
    changed = SHIPPED.replace(b"between", b"BETWEEN")
    bundle = make_packed(changed)
    with pytest.raises(BundleError, match=r"program\.pte\.int8: expected to expand to SHA-256"):
        bundle.program_path.resolve()
    assert not [path for path in bundle.path.iterdir() if path.name.endswith("program.pte")]


def test_a_folder_that_cannot_be_written_is_named(make_packed: Make) -> None:
    """With what to do about it."""
    bundle = make_packed()
    (bundle.path / "program.pte").mkdir()  # root may write anywhere, but not over a folder
    with pytest.raises(BundleError, match="expected room for 47 bytes in a folder that can be"):
        bundle.program_path.resolve()


def _expand(path: Path) -> bytes:
    return Bundle.open(path).program_path.read_bytes()


def test_several_processes_may_expand_at_the_same_time(make_packed: Make) -> None:
    """All read the whole program."""
    path = make_packed().path
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert set(pool.map(_expand, [path] * 8)) == {PROGRAM}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": (SEGMENTS[1], SEGMENTS[0])}, "expected a segment at 44 or later, got 0"),
        ({"segments": (SEGMENTS[0], SEGMENTS[0])}, "expected a segment at 16 or later, got 0"),
        (
            {"program": FileEntry(bytes=40, sha256="0" * 64)},
            "expected segments within 40 bytes, got 44",
        ),
    ],
)
def test_segments_lie_apart_and_inside(change: dict[str, object], message: str) -> None:
    """Whoever wrote the manifest."""
    with pytest.raises(ValidationError, match=message):
        PackedWeights(**(PACKED.model_dump() | change))


def test_a_shipped_file_of_another_size_is_refused(make_packed: Make) -> None:
    """Before a byte of it is read."""
    with pytest.raises(ValidationError, match="segments add up to, got 47"):
        make_packed(SHIPPED + b"!")


def test_the_program_is_not_shipped_beside_its_packed_form(
    tmp_path: Path, fields: dict[str, Any], fill: Callable[[Path], None]
) -> None:
    """One of both, so that nobody downloads both."""
    fields["program"] = fields["program"].model_copy(update={"packed": PACKED})
    with staging_folder(tmp_path / "bundle") as staging:
        fill(staging)
        (staging / PACKED.file).write_bytes(SHIPPED)
        with pytest.raises(ValidationError, match=r"program\.pte or program\.pte\.int8, got both"):
            finish_bundle(staging, tmp_path / "bundle", fields)
