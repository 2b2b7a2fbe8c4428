"""Runs every method in a process of its own and reads what came of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from carpool_export.doctor.child import Answer, Order, place_name, read_places
from carpool_export.doctor.products import FROZEN_KERNELS, PORTABLE_KERNELS, RUN_TIME_KERNELS
from carpool_export.doctor.profile import read_etdump
from carpool_export.doctor.program import StaticMethod
from carpool_export.doctor.report import KernelTime, Measured, Roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a method is called with.

    Attributes:
        inputs: of the calls that are measured, in order.
        golden: of the golden step's call, or None.
        sizes: what each bound's value is in the measured call, None for one that two bounds
            share; None as a whole where the call is at the bounds.
    """

    inputs: Sequence[Tensor]
    golden: Sequence[Tensor] | None = None
    sizes: Mapping[int, int | None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What a method's process brought back; nothing where there was none.

    Attributes:
        measured: without a roofline, because the peak is known when all methods ran.
        peak_gflops: that was found there.
        golden: the golden call's outputs.
        failed: what went wrong, or None.
    """

    measured: Measured | None = None
    peak_gflops: float = 0.0
    golden: Sequence[Tensor] = ()
    failed: str | None = None


def take(
    program: Path,
    method: StaticMethod,
    call: Call,
    *,
    repeats: int,
    threads: int | None,
    etdump: Path | None,
    peak_program: Path,
    etrecord: Any,  # noqa: ANN401  executorch has no type information
) -> Taken:
    """Measures a method.

    Args:
        program: the ``.pte``.
        method: one of its methods.
        call: its inputs.
        repeats: calls that count.
        threads: of the runtime; one per core if None.
        etdump: a folder that keeps the ETDump, or None.
        peak_program: from ``write_peak_program``.
        etrecord: of this method, as ``read_etrecord`` gives it, or None.

    Raises:
        BundleError: the ETRecord does not fit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order = Order(
            program=program.absolute(),
            method=method.name,
            inputs=_save(folder / "inputs", call.inputs),
            golden=None if call.golden is None else _save(folder / "golden", call.golden),
            golden_outputs=folder / "outputs",
            repeats=repeats,
            threads=threads,
            etdump=(etdump or folder).absolute() / f"{method.name}.etdp",
            peak_program=peak_program.absolute(),
            answer=folder / "answer.json",
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "carpool_export.doctor.child"],
            input=order.model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not order.answer.exists():
            return Taken(failed=_reason(done))
        answer = Answer.model_validate_json(order.answer.read_text(encoding="utf-8"))
        profile = read_etdump(order.etdump, method, etrecord=etrecord)
        golden = read_places(order.golden_outputs) if call.golden is not None else []
    return Taken(
        measured=Measured(
            sizes=tuple(tuple(tensor.shape) for tensor in call.inputs),
            threads=answer.threads,
            repeats=repeats,
            milliseconds=1000 * answer.seconds,
            opening_bytes=answer.opening_bytes,
            memory_bytes=answer.memory_bytes,
            etdump_milliseconds=profile.milliseconds,
            kernels=tuple(profile.kernels),
            delegates=tuple(profile.delegates),
            rest_share=1 - sum(kernel.share for kernel in profile.kernels),
            roofline=None,
        ),
        peak_gflops=answer.peak_gflops,
        golden=golden,
    )


def roofline(
    method: StaticMethod, measured: Measured, call: Call, *, peak: float
) -> Roofline | None:
    """How near the call came to the least time that its products can take.

    A call at the bounds: all products. Another one: those by frozen weights, because the file
    tells the sizes of values at the bounds alone, and of these products only the rows change.
    """
    frozen_only = call.sizes is not None
    products = [p for p in method.products if p.frozen or not frozen_only]
    counts = [product.operations(call.sizes or {}) for product in products]
    gigaflop = sum(count for count in counts if count is not None) / 1e9
    if not gigaflop:
        return None
    seconds = measured.milliseconds / 1000
    uncounted = counts.count(None)
    kernels = _products_seconds(measured.kernels, len(products), frozen_only=frozen_only)
    return Roofline(
        counted="frozen" if frozen_only else "all",
        products=len(products) - uncounted,
        uncounted=uncounted,
        gigaflop=gigaflop,
        peak_gflops=peak,
        achieved_gflops=gigaflop / seconds,
        least_milliseconds=1000 * gigaflop / peak,
        share_of_peak=gigaflop / seconds / peak,
        kernels_share_of_peak=None if not kernels or uncounted else gigaflop / kernels / peak,
    )


def _products_seconds(
    kernels: Sequence[KernelTime], count: int, *, frozen_only: bool
) -> float | None:
    """Of the kernels that compute the products; None if they are not as many as the products."""
    names = FROZEN_KERNELS if frozen_only else FROZEN_KERNELS + RUN_TIME_KERNELS
    chosen = [
        kernel
        for kernel in kernels
        if (kernel.name.startswith(names) if kernel.backend else kernel.name in PORTABLE_KERNELS)
    ]
    if sum(kernel.calls for kernel in chosen) != count:
        return None
    return math.fsum(kernel.milliseconds for kernel in chosen) / 1000


def _save(path: Path, tensors: Sequence[Tensor]) -> Path:
    save_file({place_name(i): tensor.contiguous() for i, tensor in enumerate(tensors)}, path)
    return path


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that says something, of what the process printed."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"the runtime ended with signal {-done.returncode}"
    return lines[-1] if lines else f"the runtime ended with {done.returncode}"
