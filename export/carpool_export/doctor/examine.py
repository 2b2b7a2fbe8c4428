"""Puts the report together."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.bundle import Bundle
from carpool.bundle.manifest import Method, TensorSpec
from carpool.errors import BundleError, ConfigError
from carpool.files import make_folder
from carpool_export.doctor import android
from carpool_export.doctor.findings import find
from carpool_export.doctor.inputs import Arrays, bundle_calls, call_at_the_bounds
from carpool_export.doctor.measure import Call, Taken, roofline, take
from carpool_export.doctor.peak import write_peak_program
from carpool_export.doctor.program import StaticMethod, StaticTensor, methods_of, parts_of
from carpool_export.doctor.report import (
    BundleReport,
    MethodReport,
    Operator,
    ReplayCheck,
    Report,
    SegmentFacts,
    TensorFacts,
)
from carpool_export.lowering.private.pte import read_etrecord, read_pte
from carpool_export.parity import relative_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        batch: rows of the golden step; its own if None. For a bundle alone.
        length: tokens of each row; their own if None. For a bundle alone.
        repeats: calls that count.
        threads: of the runtime and of the peak; one per core if None.
        etdump: a folder that keeps every method's ETDump, or None.
        etrecord: of the same export, for ExecuTorch's Inspector, or None.
    """

    batch: int | None = None
    length: int | None = None
    repeats: int = 20
    threads: int | None = None
    etdump: Path | None = None
    etrecord: Path | None = None


def examine(path: Path, settings: Settings, *, announce: Callable[[str], None]) -> Report:
    """Reads a program, runs each of its methods and says what it found.

    Args:
        path: a bundle's folder or a ``.pte``.
        settings: how to measure.
        announce: told what happens next.

    Raises:
        BundleError: nothing there, not a program or bundle, truncated, or an ETRecord that does
            not fit.
        ConfigError: sizes outside of the program's bounds, or for a bare program.
    """
    bundle = _open(path, settings)
    program = path if bundle is None else bundle.program_path
    announce("reading the program")
    file = read_pte(program)
    methods = methods_of(file)
    records = {method.name: _etrecord(settings.etrecord, method.name) for method in methods}
    if settings.etdump is not None:
        make_folder(settings.etdump)
    golden: Arrays = {} if bundle is None else bundle.golden()[0]
    calls = _calls(bundle, golden, methods, settings)
    taken: dict[str, Taken] = {}
    with tempfile.TemporaryDirectory() as folder:
        announce("making a product to compare with")
        peak_program = write_peak_program(Path(folder) / "peak.pte")
        for method in methods:
            announce(f"running {method.name}")
            call = calls.get(method.name)
            if call is None:
                taken[method.name] = Taken()
                continue
            taken[method.name] = take(
                program,
                method,
                call,
                repeats=settings.repeats,
                threads=settings.threads,
                etdump=settings.etdump,
                peak_program=peak_program,
                etrecord=records[method.name],
            )
    taken = _with_rooflines(methods, calls, taken)
    report = Report(
        path=str(path),
        program=str(program),
        executorch=importlib.metadata.version("executorch"),
        file_bytes=file.file_bytes,
        parts=tuple(parts_of(file)),
        methods=tuple(_method_report(m, bundle, taken[m.name]) for m in methods),
        bundle=None if bundle is None else _bundle_report(bundle, golden, taken),
        findings=(),
    )
    return report.model_copy(update={"findings": tuple(find(report))})


def _open(path: Path, settings: Settings) -> Bundle | None:
    if not path.exists():
        raise BundleError(
            f"{path}: expected a bundle's folder or a .pte, found nothing there. Check the path."
        )
    if path.is_dir():
        return Bundle.open(path)
    if settings.batch is not None or settings.length is not None:
        raise ConfigError(
            f"{path}: --batch and --length resize a bundle's golden step; a bare .pte is run at "
            "its largest sizes. Leave them out, or give the bundle's folder."
        )
    return None


def _etrecord(path: Path | None, method: str) -> Any:  # noqa: ANN401  executorch has no types
    return None if path is None else read_etrecord(path, method)


def _calls(
    bundle: Bundle | None, golden: Arrays, methods: Sequence[StaticMethod], settings: Settings
) -> Mapping[str, Call]:
    if bundle is not None:
        return bundle_calls(bundle, golden, batch=settings.batch, length=settings.length)
    found = {method.name: call_at_the_bounds(method) for method in methods}
    return {name: call for name, call in found.items() if call is not None}


def _with_rooflines(
    methods: Sequence[StaticMethod], calls: Mapping[str, Call], taken: Mapping[str, Taken]
) -> dict[str, Taken]:
    """The peak is the processor's and not a method's: the best that any process found."""
    peak = max((found.peak_gflops for found in taken.values()), default=0.0)
    result = {}
    for method in methods:
        found = taken[method.name]
        if found.measured is not None:
            line = roofline(method, found.measured, calls[method.name], peak=peak)
            measured = found.measured.model_copy(update={"roofline": line})
            found = dataclasses.replace(found, measured=measured)
        result[method.name] = found
    return result


def _method_report(method: StaticMethod, bundle: Bundle | None, taken: Taken) -> MethodReport:
    known = None if bundle is None else bundle.manifest.program.methods.get(method.name)
    on_android = android.kernels()
    return MethodReport(
        name=method.name,
        bounds={} if known is None else dict(known.bounds),
        inputs=_tensors(method.inputs, () if known is None else known.inputs),
        outputs=_tensors(method.outputs, () if known is None else known.outputs),
        instructions=method.instructions,
        delegates=method.delegates,
        operators=tuple(
            Operator(name=name, calls=calls, on_android=name in on_android)
            for name, calls in method.operators.most_common()
        ),
        arena=method.arena,
        measured=taken.measured,
        failed=taken.failed,
    )


def _tensors(
    found: Sequence[StaticTensor | None], specs: Sequence[TensorSpec]
) -> tuple[TensorFacts, ...]:
    names = [spec.name for spec in specs]
    shapes: list[tuple[int | str, ...]] = [spec.shape for spec in specs]
    if len(specs) != len(found):  # a bare program, or one that is not the manifest's
        names, shapes = [], []
    facts = []
    for place, tensor in enumerate(found):
        facts.append(
            TensorFacts(
                name=names[place] if names else None,
                dtype="not a tensor" if tensor is None else tensor.dtype_name,
                shape=shapes[place] if shapes else () if tensor is None else tensor.shape,
                dynamic=tensor is not None and tensor.dynamic,
                largest_bytes=0 if tensor is None else tensor.bytes,
            )
        )
    return tuple(facts)


def _bundle_report(bundle: Bundle, golden: Arrays, taken: Mapping[str, Taken]) -> BundleReport:
    manifest = bundle.manifest
    outputs = _outputs(manifest.program.methods, taken)
    return BundleReport(
        id=bundle.id,
        preset=manifest.preset,
        model=manifest.model.name,
        documents=manifest.documents.count,
        theta=_theta(bundle, golden, outputs.get("gradient")),
        bytes_per_round=2 * 4 * manifest.layout.num_values,
        parity=manifest.parity,
        replay=tuple(_replay(bundle, golden, outputs)),
        licences=manifest.licences,
    )


def _outputs(methods: Mapping[str, Method], taken: Mapping[str, Taken]) -> dict[str, Tensor]:
    """The golden step's outputs by name."""
    return {
        spec.name: tensor
        for name, method in methods.items()
        if name in taken and len(taken[name].golden) == len(method.outputs)
        for spec, tensor in zip(method.outputs, taken[name].golden, strict=True)
    }


def _replay(bundle: Bundle, golden: Arrays, outputs: Mapping[str, Tensor]) -> list[ReplayCheck]:
    """Against what the exporter expected; the tokenizer is `carpool selftest`'s to check."""
    limits = bundle.manifest.golden
    checks = []
    for name, expected, tolerance in (
        ("loss", "expected_loss", limits.loss_tolerance),
        ("gradient", "expected_gradient", limits.gradient_tolerance),
        ("scores", "expected_scores", limits.scores_tolerance),
        ("embeddings", "expected_embed", limits.embed_tolerance),
    ):
        if name not in outputs:
            continue
        if expected not in golden:
            path = bundle.path / limits.file
            raise BundleError(f"{path}: expected an array {expected!r}, got {sorted(golden)}.")
        wanted = torch.from_numpy(golden[expected].copy())
        error = relative_error(outputs[name].reshape(wanted.shape), wanted)
        checks.append(
            ReplayCheck(
                name=name,
                error=error if error < float("inf") else None,
                tolerance=tolerance,
                passed=error <= tolerance,
            )
        )
    return checks


def _theta(bundle: Bundle, golden: Arrays, gradient: Tensor | None) -> tuple[SegmentFacts, ...]:
    """Theta's segments, with their gradient over the golden step and its own catalogue."""
    manifest = bundle.manifest
    over = manifest.layout
    if manifest.program.values_per_document:
        over = over.for_documents(len(golden["documents"]))
    places = over.slices()
    facts = []
    for segment in manifest.layout.segments:
        part = None if gradient is None else gradient.reshape(-1)[places[segment.name]]
        facts.append(
            SegmentFacts(
                name=segment.name,
                group=segment.group,
                shape=segment.shape,
                values=segment.num_values,
                scale=segment.scale,
                gradient_largest=None if part is None else float(part.abs().max()),
                gradient_zeros=None if part is None else float((part == 0).float().mean()),
            )
        )
    return tuple(facts)
