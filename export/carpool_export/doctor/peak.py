"""How fast the runtime multiplies at best: the roof that a method's products are held against."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from carpool_export.doctor.private import PlainProgram

_ROWS = 512
_WIDTHS = (384, 768, 1536)
_SECONDS = 0.6


def write_peak_program(path: Path) -> Path:
    """A program with a method for each width: a product by a frozen square matrix.

    By the runtime's own kernel, because it is up to twice as fast as torch's, or half.
    """
    # Imported here: the compiler takes seconds, and the process that measures must not pay them.
    from carpool_export.lowering import MethodToLower, lower  # noqa: PLC0415

    methods = {
        _name(width): MethodToLower(
            function=functools.partial(
                torch.nn.functional.linear, weight=torch.full((width, width), 0.5)
            ),
            example_inputs=(torch.ones(_ROWS, width),),
            dynamic_shapes=(None,),
        )
        for width in _WIDTHS
    }
    path.write_bytes(lower(methods, progress=lambda _: None))
    return path


def peak_gflops(program: PlainProgram) -> float:
    """10^9 operations a second of the fastest of many products, with the runtime's threads.

    Args:
        program: from ``write_peak_program``.
    """
    best, end = 0.0, time.perf_counter() + _SECONDS
    factors = {width: torch.rand(_ROWS, width) for width in _WIDTHS}
    while time.perf_counter() < end:
        for width, factor in factors.items():
            start = time.perf_counter()
            program.call(_name(width), [factor])
            seconds = time.perf_counter() - start
            best = max(best, 2 * _ROWS * width * width / seconds / 1e9)
    return best


def _name(width: int) -> str:
    return f"product_{width}"
