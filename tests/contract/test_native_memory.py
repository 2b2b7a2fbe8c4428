"""What freed native memory does after ``return_large_blocks``."""

from __future__ import annotations

import subprocess
import sys

_FREE_ONE_BELOW_ANOTHER = """
import ctypes, sys
from carpool.measuring import anonymous_bytes
from carpool.native import return_large_blocks
if sys.argv[1] == "returned":
    return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # glibc raises its threshold to this
before = anonymous_bytes()
block = libc.malloc(20 << 20)
ctypes.memset(block, 1, 20 << 20)
above = libc.malloc(64 << 10)  # what lies above keeps the heap from shrinking
libc.free(block)
print((anonymous_bytes() - before) >> 20)
"""


def kept_mebibytes(mode: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _FREE_ONE_BELOW_ANOTHER, mode],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(run.stdout)


def test_a_freed_block_of_20_mebibytes_goes_back_to_the_system() -> None:
    """Without the call the process keeps it, so the test sees the call and nothing else."""
    assert kept_mebibytes("as it is") >= 15
    assert kept_mebibytes("returned") <= 2
