"""The runtime's private names that a measurement needs; ``lowering.private.NAMES`` lists them.

Apart from the compiler's, because the process that measures must load no compiler. Tried on
ExecuTorch 1.5.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executorch.extension.pybindings import portable_lib

from carpool.native import muted_standard_error


def load_with_etdump(path: Path) -> Any:  # noqa: ANN401  executorch has no type information
    """The program in a runtime that records every kernel's time."""
    return portable_lib._load_for_executorch(str(path), enable_etdump=True)  # noqa: SLF001


def start_threads(count: int | None) -> int:
    """Starts the runtime's threads, one per core if no number is given; says how many.

    To be called before any method is loaded: a loaded one keeps the threads that it found.
    """
    with muted_standard_error():  # it prints about files that only exist on ARM
        if count is not None:
            portable_lib._unsafe_reset_threadpool(count)  # noqa: SLF001
        return int(portable_lib._threadpool_get_thread_count())  # noqa: SLF001


def registered_kernels() -> frozenset[str]:
    """The operators that this runtime has kernels for, for example ``aten::mm.out``."""
    return frozenset(portable_lib._get_operator_names())  # noqa: SLF001
