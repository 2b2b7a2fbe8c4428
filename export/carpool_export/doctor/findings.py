"""What is wrong with a program, why it matters and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from carpool.licences import NOT_STATED
from carpool_export.doctor import android
from carpool_export.doctor.render import duration, size
from carpool_export.doctor.report import (
    BundleReport,
    Finding,
    MethodReport,
    Report,
    Severity,
)

SLOW_SHARE = 0.05
"""An operator outside of the delegates that takes more of a call than this is worth a warning."""

MANY_DELEGATES = 50
"""Calls of delegates in one method; each one sets its sizes anew, some microseconds."""

LOW_PEAK = 1.1
"""Share of the peak above which this was held up: products of other sizes are not much faster."""

LOOSE_ARENA = 1.25
"""Arena by the bytes in use at once."""

LARGE_ARENA_BYTES = 64 * 2**20
"""What is worth a word on a phone."""

LITTLE_GRADIENT = 1e-6
"""Of the largest gradient: float32 has about seven digits."""

_ORDER: tuple[Severity, ...] = ("problem", "warning", "note", "ok")


def find(report: Report) -> list[Finding]:
    """All findings, the gravest first."""
    parts: list[Iterator[Finding]] = []
    for method in report.methods:
        parts += [_runs(method), _operators(method), _roofline(method)]
        parts += [_delegates(method), _arena(method)]
    parts += [_android(report)]
    if report.bundle is not None:
        parts += [_replay(report.bundle), _theta(report.bundle), _licences(report.bundle)]
    return sorted(chain(*parts), key=lambda finding: _ORDER.index(finding.severity))


def _runs(method: MethodReport) -> Iterator[Finding]:
    if method.failed is not None:
        yield Finding(
            severity="problem",
            what=f"{method.name} does not run: {method.failed}.",
            why="A device with the same runtime could not run it either.",
            do="Export it with the ExecuTorch version that is to run it.",
        )
    elif method.measured is None:
        yield Finding(
            severity="note",
            what=f"{method.name} was not run: it takes an input that is no tensor, or that the "
            "manifest does not describe.",
            why="Nothing is known of its time and memory.",
            do="Call it yourself, through ExecuTorch's Python runtime.",
        )


def _operators(method: MethodReport) -> Iterator[Finding]:
    if method.measured is None:
        return
    portable = [kernel for kernel in method.measured.kernels if kernel.backend is None]
    call = duration(method.measured.etdump_milliseconds)
    for kernel in portable:
        if kernel.share > SLOW_SHARE:
            yield Finding(
                severity="warning",
                what=f"{kernel.name} takes {kernel.share:.0%} of {method.name} "
                f"({duration(kernel.milliseconds)} of {call}, calls: {kernel.calls}), outside of "
                "any delegate.",
                why="Such kernels are written for every processor, and most use one thread.",
                do=_instead(kernel.name),
            )
    if all(kernel.share <= SLOW_SHARE for kernel in portable):
        total = sum(kernel.share for kernel in portable)
        yield Finding(
            severity="ok",
            what=f"Operators outside of delegates take {total:.1%} of {method.name}.",
            why="They are the slow ones.",
            do="Nothing.",
        )


def _instead(operator: str) -> str:
    products = {"aten::mm.out", "aten::addmm.out", "aten::bmm.out", "aten::linear.out"}
    if operator in products:
        return (
            "Lower it for XNNPACK: to_edge_transform_and_lower with XnnpackPartitioner takes "
            "products by frozen weights, carpool_export.lowering.lower_gradient_program (so "
            "`carpool export`) those by run-time values too."
        )
    if operator == "aten::embedding.out":
        return "Gather less: look tokens up once, and once per layer at most."
    return (
        "Write it in what XNNPACK has, by a decomposition "
        "(carpool_export/lowering/decompositions.py), or partition the program for XNNPACK."
    )


def _roofline(method: MethodReport) -> Iterator[Finding]:
    line = None if method.measured is None else method.measured.roofline
    if line is None or (line.kernels_share_of_peak or 0) <= LOW_PEAK:
        return
    yield Finding(
        severity="note",
        what=f"The products of {method.name} run at {line.kernels_share_of_peak:.0%} of the peak "
        "that was measured: the roofline is too low.",
        why="The machine was busy when the peak was measured, or other sizes suit it better.",
        do="Run the doctor again on an idle machine.",
    )


def _delegates(method: MethodReport) -> Iterator[Finding]:
    for delegates in method.delegates:
        if delegates.backend not in android.BACKENDS:
            yield Finding(
                severity="warning",
                what=f"{method.name} needs the backend {delegates.backend}.",
                why="The Android runtime (AAR) has XNNPACK alone.",
                do="Partition it for XNNPACK, or build the runtime with this backend.",
            )
        elif delegates.calls > MANY_DELEGATES:
            yield Finding(
                severity="note",
                what=f"{method.name} enters {delegates.backend} {delegates.calls} times a call.",
                why="Each time sizes are set anew, and what lies between runs by itself.",
                do="See which operators above separate the delegates, and write them in what "
                "XNNPACK has.",
            )


def _arena(method: MethodReport) -> Iterator[Finding]:
    arena = method.arena
    if not arena.most_in_use_bytes:
        return
    ratio = arena.bytes / arena.most_in_use_bytes
    if ratio > LOOSE_ARENA and arena.bytes > LARGE_ARENA_BYTES:
        yield Finding(
            severity="warning",
            what=f"The arena of {method.name} is {ratio:.1f} times what is in use at once.",
            why=f"{size(arena.bytes)} are taken when the method is loaded.",
            do="Try another memory planning algorithm of ExecuTorch.",
        )
    elif arena.bytes > LARGE_ARENA_BYTES:
        largest = arena.largest[0]
        shape = " x ".join(map(str, largest.shape))
        yield Finding(
            severity="note",
            what=f"The arena of {method.name} is {size(arena.bytes)}, planned for the bounds; "
            f"{size(largest.bytes)} of it are {largest.count} values of {shape}.",
            why="All of it is resident once the program is open, however small the calls are.",
            do="Export with lower bounds (--max-batch, --max-length, --max-documents) if calls "
            "never come near these.",
        )


def _android(report: Report) -> Iterator[Finding]:
    lacking = {o.name for m in report.methods for o in m.operators if not o.on_android}
    for name in sorted(lacking):
        yield Finding(
            severity="problem",
            what=f"{name} has no kernel in the Android runtime.",
            why="Loading the method fails on a phone.",
            do="Replace the operator by one of ATen's that ExecuTorch has, or register a kernel "
            "in a runtime of your own.",
        )
    if not lacking:
        yield Finding(
            severity="ok",
            what="The Android runtime has every kernel that is called.",
            why="A method with a missing one does not load.",
            do="Nothing.",
        )


def _replay(bundle: BundleReport) -> Iterator[Finding]:
    failed = [check for check in bundle.replay if not check.passed]
    for check in failed:
        error = "not finite" if check.error is None else f"off by {check.error:.2g}"
        yield Finding(
            severity="problem",
            what=f"Golden step: {check.name} is {error}; at most {check.tolerance:.2g} is allowed.",
            why="This runtime does not compute what the exporter did, or the file was changed.",
            do="Do not train with it. Export the bundle again; if that does not help, this "
            "runtime is wrong on this processor.",
        )
    if bundle.replay and not failed:
        worst = max(bundle.replay, key=lambda check: (check.error or 0) / check.tolerance)
        yield Finding(
            severity="ok",
            what=f"Golden step: all within tolerance; {worst.name} is off by {worst.error:.1e} of "
            f"{worst.tolerance:.0e}.",
            why="This runtime computes what the exporter did.",
            do="Nothing. On a device: carpool selftest, which checks its tokenizer too.",
        )


def _theta(bundle: BundleReport) -> Iterator[Finding]:
    known = [segment.gradient_largest for segment in bundle.theta]
    largest = max((value for value in known if value is not None), default=0.0)
    for segment in bundle.theta:
        if segment.gradient_largest is None:
            continue
        if segment.gradient_largest == 0:
            got = "gets no gradient at all"
        elif segment.gradient_largest < LITTLE_GRADIENT * largest:
            got = f"gets at most {segment.gradient_largest:.1e} of gradient, of {largest:.1e}"
        else:
            continue
        yield Finding(
            severity="warning",
            what=f"{segment.name} ({segment.values:,} values) {got} in the golden step.",
            why="It is sent in every round and never learns.",
            do=f"Raise its scale (--scale {segment.name}=NUMBER), or export without it "
            "(--adapter, --head, --no-document-bias).",
        )


def _licences(bundle: BundleReport) -> Iterator[Finding]:
    if not bundle.licences:
        yield Finding(
            severity="warning",
            what="The manifest names no licence.",
            why="Whoever ships the bundle must know whose terms it stands under.",
            do="Export again with --model-licence, and --notice for the documents.",
        )
    for licence in bundle.licences:
        if licence.licence == NOT_STATED:
            yield Finding(
                severity="warning",
                what=f"{licence.applies_to}: nobody states the licence.",
                why="Whoever ships the bundle must know whose terms it stands under.",
                do="Find out, and export again with --model-licence or --documents-licence.",
            )
