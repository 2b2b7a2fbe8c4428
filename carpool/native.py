"""What native libraries do past Python: what they print, and the memory they keep."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h; the same in every glibc
_LARGE_BLOCK = 1 << 20


def return_large_blocks() -> None:
    """Freed blocks of 1 MiB or more go back to the system from now on (glibc; else nothing).

    By itself glibc raises this limit to the largest block that was ever freed, 32 MiB at most,
    and keeps what is smaller: a model's packed weights, after it was given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


@contextmanager
def muted_standard_error() -> Iterator[None]:
    """Drops what native code writes to standard error, for a moment and for the whole process."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
