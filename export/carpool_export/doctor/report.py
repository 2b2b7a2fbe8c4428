"""Everything that ``carpool doctor`` finds out, as one record; ``--json`` prints it."""

from __future__ import annotations

from typing import Literal

from carpool.bundle.manifest import Licence, Parity, Range
from carpool.schema import Model

Severity = Literal["ok", "note", "warning", "problem"]


class Finding(Model):
    """One thing that was looked at, why it matters and what to do about it.

    ``problem``: do not use this program; the command then exits with 1. ``warning``: it works and
    costs something. ``note``: worth to know. ``ok``: looked at, nothing to do.
    """

    severity: Severity
    what: str
    why: str
    do: str


class TensorFacts(Model):
    """An input or output.

    Attributes:
        name: the manifest's; None for a program without one.
        dtype: as torch names it.
        shape: as the manifest says, or at its largest.
        dynamic: whether a call may choose smaller sizes.
        largest_bytes: at its largest.
    """

    name: str | None
    dtype: str
    shape: tuple[int | str, ...]
    dynamic: bool
    largest_bytes: int


class Delegates(Model):
    """A backend's parts in a method, and how often a call enters one."""

    backend: str
    calls: int


class Operator(Model):
    """An operator outside of the delegates.

    Attributes:
        name: with its overload, ``"aten::mm.out"``.
        calls: in the program.
        on_android: whether the Android runtime has a kernel for it (docs/doctor.md says how that
            is known).
    """

    name: str
    calls: int
    on_android: bool


class PlannedValues(Model):
    """Tensors of one shape in the arena, at their largest; ``bytes`` of all of them together."""

    count: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Arena(Model):
    """The memory that is planned for a method's values, at their largest.

    Attributes:
        bytes: what the runtime allocates when the method is loaded.
        most_in_use_bytes: most bytes that hold values which are still needed, at one time.
        largest: what takes most of that, by shape, the largest first.
    """

    bytes: int
    most_in_use_bytes: int
    largest: tuple[PlannedValues, ...]


class KernelTime(Model):
    """All calls of one kernel together.

    Attributes:
        name: an operator's name, or the delegate's own name of its kernel.
        backend: None for a kernel outside of the delegates.
        calls: in one call of the method.
        milliseconds: sum over these calls; a mean as ``profile`` says.
        share: of the method's call, as measured with ETDump.
    """

    name: str
    backend: str | None
    calls: int
    milliseconds: float
    share: float


class DelegateTime(Model):
    """One delegate's part of a call, and the operators that it was made from, in order."""

    operators: tuple[str, ...]
    milliseconds: float
    share: float


class Roofline(Model):
    """How near a call comes to the least time that its matrix products can take.

    Attributes:
        counted: which products: those by frozen weights, or all of them.
        products: how many were counted.
        uncounted: how many of these have sizes that could not be told.
        gigaflop: floating-point operations of one call, 2 M K N for each product, in 10^9.
        peak_gflops: of many float32 products by a frozen square matrix the fastest, in the same
            runtime with as many threads.
        achieved_gflops: gigaflop by the call's median time.
        least_milliseconds: gigaflop by the peak.
        share_of_peak: achieved by peak.
        kernels_share_of_peak: the same, by the time of the products' kernels alone; None where
            these are not told apart.
    """

    counted: Literal["frozen", "all"]
    products: int
    uncounted: int
    gigaflop: float
    peak_gflops: float
    achieved_gflops: float
    least_milliseconds: float
    share_of_peak: float
    kernels_share_of_peak: float | None


class Measured(Model):
    """A method, loaded and called in a process of its own.

    Attributes:
        sizes: of each input, in order.
        threads: the runtime's.
        repeats: calls that count, after those to warm up.
        milliseconds: median of a call.
        opening_bytes: anonymous memory that opening the program added, for all its methods.
        memory_bytes: what loading the method and its first call added to that; inputs are in
            neither.
        etdump_milliseconds: of a call while ETDump recorded, which takes time of its own.
        kernels: by share, the largest first.
        delegates: likewise; empty without an ETRecord, which knows what they were made from.
        rest_share: of the recorded time, what is in no kernel: entering delegates, moving
            sizes, and the recording.
        roofline: None where the method has no product that counts.
    """

    sizes: tuple[tuple[int, ...], ...]
    threads: int
    repeats: int
    milliseconds: float
    opening_bytes: int
    memory_bytes: int
    etdump_milliseconds: float
    kernels: tuple[KernelTime, ...]
    delegates: tuple[DelegateTime, ...]
    rest_share: float
    roofline: Roofline | None


class MethodReport(Model):
    """One method.

    Attributes:
        bounds: the manifest's; empty for a program without one.
        measured: None where it could not be called, or failed.
        failed: what the runtime said, or None.
    """

    name: str
    bounds: dict[str, Range]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    instructions: int
    delegates: tuple[Delegates, ...]
    operators: tuple[Operator, ...]
    arena: Arena
    measured: Measured | None
    failed: str | None


class FilePart(Model):
    """A part of the ``.pte``; ``frozen`` if weights are what it holds."""

    name: str
    bytes: int
    frozen: bool


class SegmentFacts(Model):
    """A segment of theta and its gradient over the golden step.

    Attributes:
        gradient_largest: largest absolute value of its gradient; None without a replay.
        gradient_zeros: share of its gradient's values that are exactly 0.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    values: int
    scale: float
    gradient_largest: float | None
    gradient_zeros: float | None


class ReplayCheck(Model):
    """A result of the golden step against the exporter's; ``error`` is None if not finite."""

    name: str
    error: float | None
    tolerance: float
    passed: bool


class BundleReport(Model):
    """What only a bundle has.

    Attributes:
        bytes_per_round: theta down and an update up, float32.
        parity: what the exporter measured, as the manifest says.
        replay: empty where the program could not be run.
    """

    id: str
    preset: str
    model: str
    documents: int
    theta: tuple[SegmentFacts, ...]
    bytes_per_round: int
    parity: Parity
    replay: tuple[ReplayCheck, ...]
    licences: tuple[Licence, ...]


class Report(Model):
    """The whole report.

    Attributes:
        path: as it was given.
        program: the ``.pte`` that was examined.
        executorch: the version that ran it.
        file_bytes: of the program; the sum of ``parts``.
        bundle: None for a bare program.
    """

    path: str
    program: str
    executorch: str
    file_bytes: int
    parts: tuple[FilePart, ...]
    methods: tuple[MethodReport, ...]
    bundle: BundleReport | None
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether no finding is a problem."""
        return all(finding.severity != "problem" for finding in self.findings)
