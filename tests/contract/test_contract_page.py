"""docs/contract.md says what the code does: its vectors, files and fields are compared."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import struct
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from carpool.bundle import Bundle
from carpool.bundle.manifest import (
    SCHEMA_VERSION,
    Dimension,
    FileEntry,
    PackedWeights,
    WeightSegment,
)
from carpool.bundle.weights import expanded
from carpool.errors import Refusal
from carpool.packing import pack
from carpool.protocol import ContributionHeader, PoolHeader, TaskHeader
from carpool.randomness import shuffled, words
from carpool.schema import Model

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")


def test_the_pages_vectors_are_the_codes() -> None:
    """A Kotlin author may trust them."""

    def numbers(label: str) -> list[int]:
        line = next(line for line in PAGE.splitlines() if line.strip().startswith(label))
        return [int(n) for n in line.strip().removeprefix(label).split()]

    def stream() -> itertools.chain[int]:
        return itertools.chain(
            words(purpose="carpool/1/order", key=b"key", device_id="phone", round_number=3)
        )

    assert numbers("words ") == list(itertools.islice(stream(), 5))
    assert numbers("shuffled(10) ") == shuffled(10, stream())


def test_the_pages_packed_batch_is_the_codes() -> None:
    """From the rows in its sentence, and every array in the order of the call."""
    sentence = next(line for line in PAGE.splitlines() if line.startswith("Test vector, for the r"))
    rows = [
        np.array([int(n) for n in row.split(", ")])
        for row in re.findall(r"`\[([^]]+)\]`", sentence)
    ]
    (bound,) = re.findall(r"lower bound of (\d+):$", sentence)
    packed = pack(rows, min_length=int(bound)).named()
    printed = {
        name: [int(n) for n in numbers.split()]
        for name, numbers in re.findall(r"^    (tok\w+|slot\w+) +([-\d ]+)$", PAGE, re.MULTILINE)
    }
    assert list(printed.items()) == [(n, a.reshape(-1).tolist()) for n, a in packed.items()]


def test_the_page_lists_every_dimension() -> None:
    """In the order of the type."""
    table = PAGE.split("| dimension |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(get_args(Dimension))


def test_the_pages_layout_id_is_the_hash_of_the_line_above_it() -> None:
    """With nothing but SHA-256."""
    lines = [line.strip() for line in PAGE.splitlines()]
    place = next(i for i, line in enumerate(lines) if line.startswith('{"segments":[{'))
    assert lines[place + 1] == hashlib.sha256(lines[place].encode()).hexdigest()


def test_the_page_names_the_schemas_version() -> None:
    """Opening begins with it."""
    assert f"an object with `schema_version` {SCHEMA_VERSION};" in PAGE


def test_the_page_lists_every_file_of_a_bundle(make_bundle: object) -> None:
    """Both ways."""
    assert callable(make_bundle)
    bundle = make_bundle()
    assert isinstance(bundle, Bundle)
    listed = set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", PAGE, flags=re.MULTILINE))
    assert listed == {path.name for path in bundle.path.iterdir()}


def test_the_pages_packed_weights_expand_as_it_says() -> None:
    """Each weight worked out with a struct."""
    shipped, program = (
        bytes.fromhex("".join(line.split()[1:]))
        for line in PAGE.splitlines()
        if line.startswith(("    shipped  ", "    program  "))
    )
    packed = PackedWeights(
        file="program.pte.int8",
        program=FileEntry(bytes=len(program), sha256=hashlib.sha256(program).hexdigest()),
        segments=(WeightSegment(offset=8, rows=2, columns=3, scale_per="row"),),
    )
    assert packed.file_bytes == len(shipped)
    assert b"".join(expanded(io.BytesIO(shipped), packed)) == program
    weights = struct.unpack("<6f", program[8:32])
    assert weights == (1.0, 2.0, -3.0, 127 / 8, -128 / 8, -1 / 8)


@pytest.mark.parametrize(
    ("name", "header"),
    [("pool", PoolHeader), ("task", TaskHeader), ("contribution", ContributionHeader)],
)
def test_the_page_lists_every_field_of_a_message(name: str, header: type[Model]) -> None:
    """In the order of the schema."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    assert re.findall(r"`([a-z_]+)`", row.split("|")[2]) == list(header.model_fields)


def test_the_page_lists_every_reason() -> None:
    """In the order of the type."""
    line = next(line for line in PAGE.splitlines() if line.startswith("A reason is one of "))
    assert re.findall(r"`([a-z-]+)`", line) == list(get_args(Refusal))
