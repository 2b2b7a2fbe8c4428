# ruff: noqa: SLF001  private names are what this module is for
"""The runtime's private names that a measurement needs; ``lowering.private.NAMES`` lists them.

Apart from the compiler's, and past ``executorch.runtime``, which imports the whole compiler: the
process that measures starts in a third of the time without. Tried on ExecuTorch 1.5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401  its libraries must be loaded before the runtime's
from executorch.extension.pybindings import _C
from torch import Tensor

from carpool.native import muted_standard_error


class PlainProgram:
    """A program in the runtime as it is on a device.

    Holds program and methods together, because the runtime keeps neither alive for the other.
    """

    def __init__(self, path: Path) -> None:
        self._program = _C._load_program(str(path))
        self._methods: dict[str, Any] = {}

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, copied; the first call loads the method."""
        if method not in self._methods:
            self._methods[method] = self._program.load_method(method)
        return list(self._methods[method](inputs, clone_outputs=True))


def load_with_etdump(path: Path) -> Any:  # noqa: ANN401  executorch has no type information
    """The program in a runtime that records every kernel's time."""
    return _C._load_for_executorch(str(path), enable_etdump=True)


def start_threads(count: int | None) -> int:
    """Starts the runtime's threads, one per core if no number is given; says how many.

    To be called before any method is loaded: a loaded one keeps the threads that it found.
    """
    with muted_standard_error():  # it prints about files that only exist on ARM
        if count is not None:
            _C._unsafe_reset_threadpool(count)
        return int(_C._threadpool_get_thread_count())


def registered_kernels() -> frozenset[str]:
    """The operators that this runtime has kernels for, for example ``aten::mm.out``."""
    return frozenset(_C._get_operator_names())
