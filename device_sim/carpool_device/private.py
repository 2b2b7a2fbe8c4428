"""Every use of a name that ExecuTorch keeps private. Tried on executorch 1.5.1.

``tests/device/test_device_private.py`` fails when one of them moves.
"""

from __future__ import annotations

from typing import Any

from carpool.errors import DeviceError
from carpool.native import muted_standard_error

POOL_SIZE = "_threadpool_get_thread_count"
RESET_POOL = "_unsafe_reset_threadpool"


def start_thread_pool() -> None:
    """Starts the runtime's threads, without the notices that it prints on x86 while doing so.

    It would otherwise start them in the first call that needs them, and print five lines about
    files that only exist on ARM.
    """
    pool_size = getattr(_bindings(), POOL_SIZE, None)
    if pool_size is not None:
        with muted_standard_error():
            pool_size()


def resize_thread_pool(count: int) -> None:
    """Gives the runtime ``count`` threads from now on. No call may be under way.

    Raises:
        DeviceError: this version of ExecuTorch cannot.
    """
    reset = getattr(_bindings(), RESET_POOL, None)
    if reset is None:
        raise DeviceError(
            f"this version of ExecuTorch has no {RESET_POOL}, so its number of threads cannot be "
            "chosen. Leave it at the default."
        )
    with muted_standard_error():
        reset(count)


def _bindings() -> Any:  # noqa: ANN401  executorch has no type information
    from executorch.extension.pybindings import portable_lib  # noqa: PLC0415  takes seconds

    return portable_lib
