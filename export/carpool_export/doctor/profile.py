"""An ETDump as shares of a call's time.

Of each kernel the mean over the calls whose total is in the middle half: parts of one mean add up
to the whole, which medians of parts do not (on a busy machine they leave a third out), and calls
that something else held up are not in it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executorch.devtools import Inspector

from carpool.errors import BundleError
from carpool_export.doctor.child import WARM_UP_CALLS
from carpool_export.doctor.program import StaticMethod
from carpool_export.doctor.report import DelegateTime, KernelTime

_CALL = "Method::execute"
_KERNEL = "native_call_"  # what ETDump puts before an operator's name
_DELEGATE = "DELEGATE_CALL"
_RUN = "Execute"  # the block of events that calls are in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A call's milliseconds under ETDump, and its parts, the slowest first."""

    milliseconds: float
    kernels: list[KernelTime]
    delegates: list[DelegateTime]


def read_etdump(
    path: Path,
    method: StaticMethod,
    *,
    etrecord: Any = None,  # noqa: ANN401  executorch has no type information
) -> Profile:
    """A method's calls as shares of their time.

    Args:
        path: an ETDump of the method alone, every call with the same sizes.
        method: whose calls were recorded; ETDump leaves out namespaces and backends.
        etrecord: ``read_etrecord``'s, of this method, or None: says what each delegate was made
            from.

    Raises:
        BundleError: the ETRecord does not fit, or ETDump recorded no call.
    """
    events = _events(path, etrecord)
    totals = [event.perf_data.raw for event in events if event.name == _CALL]
    if not totals:
        raise BundleError(f"{path}: expected an ETDump of a call, found none in it.")
    chosen = _middle_half(totals[0])
    call = _mean(totals[0], chosen)
    full_names = {name.rpartition("::")[2]: name for name in method.operators}
    backends = [delegates.backend for delegates in method.delegates]
    backend = backends[0] if len(backends) == 1 else "a delegate"
    times: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    delegates = []
    for event in events:
        name, milliseconds = str(event.name), _mean(event.perf_data.raw, chosen)
        if event.is_delegated_op:
            times[name.partition("#")[0].strip(), backend].append(milliseconds)
        elif name.startswith(_KERNEL):
            short = name.removeprefix(_KERNEL)
            times[full_names.get(short, short), None].append(milliseconds)
        elif name == _DELEGATE and etrecord is not None:
            delegates.append(
                DelegateTime(
                    operators=tuple(event.op_types),
                    milliseconds=milliseconds,
                    share=milliseconds / call,
                )
            )
    kernels = [
        KernelTime(
            name=name,
            backend=where,
            calls=len(found),
            milliseconds=sum(found),
            share=sum(found) / call,
        )
        for (name, where), found in times.items()
    ]
    return Profile(
        milliseconds=call,
        kernels=sorted(kernels, key=lambda kernel: -kernel.milliseconds),
        delegates=sorted(delegates, key=lambda delegate: -delegate.milliseconds),
    )


def _events(path: Path, etrecord: Any) -> list[Any]:  # noqa: ANN401  as below
    """The timed events of the calls."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no values were recorded, only times
            inspector = Inspector(etdump_path=str(path), etrecord=etrecord)
    except Exception as error:
        given = "" if etrecord is None else " with this ETRecord"
        raise BundleError(
            f"{path}: ExecuTorch's Inspector cannot read it{given}: "
            f"{type(error).__name__}: {error}. Use the ETRecord of the same export."
        ) from error
    blocks = [block for block in inspector.event_blocks if block.name == _RUN]
    return [event for block in blocks for event in block.events if event.perf_data is not None]


def _middle_half(totals: Sequence[float]) -> list[int]:
    """Which calls count: not the first ones, and neither the slowest nor the fastest quarter."""
    counted = range(WARM_UP_CALLS, len(totals))
    order = sorted(counted, key=lambda call: totals[call])
    quarter = len(order) // 4
    return order[quarter : len(order) - quarter]


def _mean(times: Sequence[float], chosen: Sequence[int]) -> float:
    """An event that a call did not have is left out."""
    found = [times[call] for call in chosen if call < len(times)]
    return math.fsum(found) / len(found) if found else 0.0
