"""Reading a ``.pte`` as data: ExecuTorch offers its own reader as internal only.

Tried on ExecuTorch 1.5.1.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    XNNHeader,
    _get_schema_bytes,
)
from executorch.devtools import parse_etrecord
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _ExtendedHeader, _get_extended_header

from carpool.errors import BundleError

_IDENTIFIER = slice(4, 6)  # of the flatbuffer: "ET" and two digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class PteFile:
    """A ``.pte``, its weights left where they are.

    Attributes:
        program: an ``executorch.exir.schema.Program``.
        file_bytes: the file's size.
        program_bytes: of the flatbuffer at its start.
        segments_start: where the segments' offsets count from.
    """

    path: Path
    program: Any
    file_bytes: int
    program_bytes: int
    segments_start: int

    def segment(self, index: int) -> bytes:
        """A segment's bytes."""
        found = self.program.segments[index]
        with self.path.open("rb") as file:
            file.seek(self.segments_start + found.offset)
            return file.read(found.size)


def read_pte(path: Path) -> PteFile:
    """Reads the program of a ``.pte``, and checks that the file is as long as it says.

    Raises:
        BundleError: no such file, not a ``.pte``, or truncated.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_ExtendedHeader.NUM_HEAD_BYTES)
    except OSError as error:
        raise BundleError(f"{path}: expected a .pte, got: {error}") from error
    if head[_IDENTIFIER] != b"ET":
        raise BundleError(
            f"{path}: expected an ExecuTorch program (.pte), got a file of {size} bytes that does "
            "not begin like one. Give the path of a .pte or of a bundle's folder."
        )
    header = _get_extended_header(head)
    program_bytes = size if header is None else header.program_size
    start = 0 if header is None else header.segment_base_offset
    _expect_bytes(path, found=size, expected=program_bytes)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            program: Any = _flatbuffer_to_program(data[:program_bytes])
        except Exception as error:
            raise BundleError(
                f"{path}: expected an ExecuTorch program, got one that cannot be read "
                f"({type(error).__name__}: {error}). Copy or export it again."
            ) from error
    ends = [start + segment.offset + segment.size for segment in program.segments]
    _expect_bytes(path, found=size, expected=max(ends, default=0))
    return PteFile(
        path=path,
        program=program,
        file_bytes=size,
        program_bytes=program_bytes,
        segments_start=start,
    )


def _expect_bytes(path: Path, *, found: int, expected: int) -> None:
    if found < expected:
        raise BundleError(
            f"{path}: expected at least {expected} bytes, as its header says, found {found}: the "
            "file is truncated. Copy or export it again."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class XnnpackGraph:
    """What XNNPACK was given in one delegate.

    Attributes:
        nodes: (kind, fields), in order, for example ``("XNNFullyConnected", {...})``.
        sizes: of each value by its id, at the bounds where they are dynamic.
        frozen: the ids of the values whose data the file holds.
        constant_bytes: of the data that the payload itself holds.
    """

    nodes: list[tuple[str, dict[str, Any]]]
    sizes: dict[int, tuple[int, ...]]
    frozen: set[int]
    constant_bytes: int


def read_xnnpack_graph(payload: bytes) -> XnnpackGraph:
    """Reads the graph out of a delegate's payload.

    Raises:
        ValueError: the payload is not XNNPACK's.
    """
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    end = header.flatbuffer_offset + header.flatbuffer_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "graph.bin"
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(payload[header.flatbuffer_offset : end])
        _flatc_decompile(str(folder), str(schema), str(binary), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    # flatc writes infinite bounds in its own way
    graph = json.loads(re.sub(r"(?<=[ \-])inf\b", "Infinity", text))
    sizes, frozen = {}, set()
    for value in graph["xvalues"]:
        fields = value["xvalue_union"]
        fields = fields.get("tensor_value", fields)  # a quantised one wraps it
        sizes[fields["id_out"]] = tuple(fields.get("dims", ()))
        if fields["constant_buffer_idx"]:
            frozen.add(fields["id_out"])
    return XnnpackGraph(
        nodes=[(node["xnode_union_type"], node["xnode_union"]) for node in graph["xnodes"]],
        sizes=sizes,
        frozen=frozen,
        constant_bytes=header.constant_data_size,
    )


def read_etrecord(path: Path, method: str) -> Any:  # noqa: ANN401  executorch has no types
    """One method's part of an ETRecord, under the one name that the Inspector looks for.

    Raises:
        BundleError: no ETRecord, or none of a program with this method.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ExecuTorch uses what torch deprecates
            record = parse_etrecord(str(path))
    except Exception as error:
        raise BundleError(
            f"{path}: expected an ETRecord, got: {type(error).__name__}: {error}. "
            "Write one with `carpool export --etrecord`."
        ) from error
    for name in ("_debug_handle_map", "_delegate_map", "_instruction_id_to_num_outs_map"):
        by_method = getattr(record, name) or {}
        if method not in by_method:
            raise BundleError(
                f"{path}: expected an ETRecord with the method {method!r}, got one with "
                f"{sorted(by_method)}. Use the ETRecord of the same export."
            )
        setattr(record, name, {"forward": by_method[method]})
    if isinstance(record.edge_dialect_program, dict):
        record.edge_dialect_program = record.edge_dialect_program[method]
    return record
