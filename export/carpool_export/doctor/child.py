"""Measures one method in this process: ``python -m carpool_export.doctor.child ORDER``.

A process of its own, so that memory is the method's alone and a crash ends no more than this.
Imports no compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from carpool.measuring import anonymous_bytes, median_seconds
from carpool.schema import Model
from carpool_export.doctor.peak import peak_gflops
from carpool_export.doctor.private import PlainProgram, load_with_etdump, start_threads

WARM_UP_CALLS = 2
"""Under ETDump; the first call of a method packs nothing more, but finds cold caches."""


class Order(Model):
    """What to measure. Tensors stand in files, by their place in the call (``place_name``).

    Attributes:
        inputs: of the calls that are measured.
        golden: of a call whose outputs are wanted, or None.
        golden_outputs: where these go.
        threads: of the runtime; one per core if None.
        etdump: where the ETDump goes.
        peak_program: from ``write_peak_program``.
        answer: where the answer goes.
    """

    program: Path
    method: str
    inputs: Path
    golden: Path | None
    golden_outputs: Path
    repeats: int
    threads: int | None
    etdump: Path
    peak_program: Path
    answer: Path


class Answer(Model):
    """What was measured; see ``report.Measured``."""

    threads: int
    seconds: float
    opening_bytes: int
    memory_bytes: int
    peak_gflops: float


def place_name(place: int) -> str:
    """A tensor's name in a file of inputs or outputs."""
    return f"{place:04d}"


def read_places(path: Path) -> list[Tensor]:
    """Tensors in the order of the call."""
    found = load_file(path)
    return [found[name] for name in sorted(found)]


def measure(order: Order) -> Answer:
    """Memory first, then time, then the golden step; what would slow these comes after them."""
    inputs = read_places(order.inputs)
    threads = start_threads(order.threads)
    opening, memory, seconds = _plain(order, inputs)
    recording = load_with_etdump(order.program)
    for _ in range(WARM_UP_CALLS + order.repeats):
        recording.run_method(order.method, inputs)
    recording.write_etdump_result_to_file(str(order.etdump))
    return Answer(
        threads=threads,
        seconds=seconds,
        opening_bytes=opening,
        memory_bytes=memory,
        peak_gflops=peak_gflops(PlainProgram(order.peak_program)),
    )


def _plain(order: Order, inputs: list[Tensor]) -> tuple[int, int, float]:
    """Bytes that opening the program added, and its method; median seconds of a call."""
    before = anonymous_bytes()
    program = PlainProgram(order.program)
    opened = anonymous_bytes()
    program.call(order.method, inputs)
    called = anonymous_bytes()
    seconds = median_seconds(lambda: program.call(order.method, inputs), repeats=order.repeats)
    if order.golden is not None:
        outputs = program.call(order.method, read_places(order.golden))
        copies = {place_name(place): output.clone() for place, output in enumerate(outputs)}
        save_file(copies, order.golden_outputs)
    return opened - before, called - opened, seconds


if __name__ == "__main__":
    asked = Order.model_validate_json(sys.stdin.read())
    asked.answer.write_text(measure(asked).model_dump_json(), encoding="utf-8")
