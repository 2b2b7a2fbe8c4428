"""Measures one method in this process: ``python -m carpool_export.doctor.child ORDER``.

A process of its own, so that memory is the method's alone and a crash ends no more than this.
Imports no compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from executorch.runtime import Runtime
from safetensors.torch import load_file, save_file
from torch import Tensor

from carpool.measuring import anonymous_bytes, median_seconds
from carpool.schema import Model
from carpool_export.doctor.private import load_with_etdump, start_threads

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
    answer: Path


class Answer(Model):
    """What was measured; see ``report.Measured``."""

    threads: int
    seconds: float
    memory_bytes: int


def place_name(place: int) -> str:
    """A tensor's name in a file of inputs or outputs."""
    return f"{place:04d}"


def read_places(path: Path) -> list[Tensor]:
    """Tensors in the order of the call."""
    found = load_file(path)
    return [found[name] for name in sorted(found)]


def measure(order: Order) -> Answer:
    """Memory first, then time, then the golden step; with ETDump last, which slows calls."""
    inputs = read_places(order.inputs)
    threads = start_threads(order.threads)
    answer = _plain(order, inputs, threads)
    recording = load_with_etdump(order.program)
    for _ in range(WARM_UP_CALLS + order.repeats):
        recording.run_method(order.method, inputs)
    recording.write_etdump_result_to_file(str(order.etdump))
    return answer


def _plain(order: Order, inputs: list[Tensor], threads: int) -> Answer:
    runtime = Runtime.get()
    before = anonymous_bytes()
    program = runtime.load_program(order.program)
    method = program.load_method(order.method)
    method.execute(inputs)
    memory = anonymous_bytes() - before
    seconds = median_seconds(lambda: method.execute(inputs), repeats=order.repeats)
    if order.golden is not None:
        outputs = method.execute(read_places(order.golden))
        copies = {place_name(place): output.clone() for place, output in enumerate(outputs)}
        save_file(copies, order.golden_outputs)
    return Answer(threads=threads, seconds=seconds, memory_bytes=memory)


if __name__ == "__main__":
    asked = Order.model_validate_json(sys.stdin.read())
    asked.answer.write_text(measure(asked).model_dump_json(), encoding="utf-8")
