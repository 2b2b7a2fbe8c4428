"""Every use of a name that ExecuTorch keeps private. Tried on executorch 1.5.1.

``tests/device/test_device_private.py`` fails when one of them moves.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from carpool.errors import DeviceError
from carpool.native import muted_standard_error

POOL_SIZE = "_threadpool_get_thread_count"
RESET_POOL = "_unsafe_reset_threadpool"


_LIBRARY = "lib/libexecutorch.so"
_SET_OPTION = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
_KEY_BYTES, _VALUE_BYTES, _BOOL = 64, 256, bytes(4)


def share_packed_weights() -> bool:
    """Lets XNNPACK keep one packed copy of each frozen weight in this process.

    Otherwise every loaded method packs its own. Changes memory and loading time and no result.
    The runtime has an option for it that Python does not bind: ``set_option``, with a key of 64
    bytes, a value of 256, and which of bool, int and text the value is.

    Returns:
        False where this build of ExecuTorch does not let us.
    """
    library = Path(importlib.util.find_spec("executorch").submodule_search_locations[0]) / _LIBRARY  # type: ignore[union-attr,index]
    try:
        set_option = getattr(ctypes.CDLL(str(library)), _SET_OPTION)
    except (OSError, AttributeError):
        return False
    option = _CACHE.ljust(_KEY_BYTES, b"\0") + b"\1".ljust(_VALUE_BYTES, b"\0") + _BOOL
    set_option.restype = ctypes.c_uint32
    done: int = set_option(
        ctypes.c_char_p(b"XnnpackBackend"), ctypes.c_char_p(option), ctypes.c_size_t(1)
    )
    return done == 0


_CACHE = b"weight_cache_enabled"


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
