"""An ETDump as shares of a call's time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from carpool.errors import BundleError
from carpool_export.doctor.child import WARM_UP_CALLS
from carpool_export.doctor.report import KernelTime

_CALL = "Method::execute"
_KERNEL = "native_call_"  # what ETDump puts before an operator's name
_RUN = "Execute"  # the block of events that calls are in


def read_etdump(
    path: Path, operators: set[str], *, etrecord: Path | None = None
) -> tuple[float, list[KernelTime]]:
    """Milliseconds of a call, and of every kernel in it, the slowest first.

    Medians over the calls but those to warm up; ETDump's own time is in the call's.

    Args:
        path: an ETDump of one method, every call with the same sizes.
        operators: the method's, by full name.
        etrecord: of the same program, for ExecuTorch's Inspector.

    Raises:
        BundleError: the ETRecord does not fit, or ETDump recorded no call.
    """
    from executorch.devtools import Inspector  # noqa: PLC0415  another second to import

    try:
        inspector = Inspector(
            etdump_path=str(path), etrecord=None if etrecord is None else str(etrecord)
        )
    except Exception as error:
        given = "" if etrecord is None else f" with the ETRecord {etrecord}"
        raise BundleError(
            f"{path}: ExecuTorch's Inspector cannot read it{given}: "
            f"{type(error).__name__}: {error}. Use the ETRecord of the same export."
        ) from error
    call = 0.0
    times: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    full_names = {name.rpartition("::")[2]: name for name in operators}
    for block in inspector.event_blocks:
        for event in block.events if block.name == _RUN else ():
            if event.perf_data is None:
                continue
            milliseconds = _median(event)
            name = str(event.name)
            if name == _CALL:
                call = milliseconds
            elif event.is_delegated_op:
                kernel = name.partition("#")[0].strip()
                times[kernel, event.delegate_backend_name].append(milliseconds)
            elif name.startswith(_KERNEL):
                short = name.removeprefix(_KERNEL)
                times[full_names.get(short, short), None].append(milliseconds)
    if call <= 0:
        raise BundleError(f"{path}: expected an ETDump of a call, found none in it.")
    kernels = [
        KernelTime(
            name=name,
            backend=backend,
            calls=len(found),
            milliseconds=sum(found),
            share=sum(found) / call,
        )
        for (name, backend), found in times.items()
    ]
    return call, sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def _median(event: Any) -> float:  # noqa: ANN401  executorch has no type information
    raw = event.perf_data.raw
    return float(statistics.median(raw[WARM_UP_CALLS:] or raw))
