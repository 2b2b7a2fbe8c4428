"""The report on a terminal: short tables, findings last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from carpool_export.doctor.report import (
    BundleReport,
    Finding,
    Measured,
    MethodReport,
    Report,
    Severity,
    TensorFacts,
)

_SHOWN_KERNELS = 8
_SHOWN_DELEGATES = 3
_SHOWN_SOURCES = 5
_SHOWN_SHARE = 0.005

_STYLES: dict[Severity, str] = {
    "problem": "bold red",
    "warning": "yellow",
    "note": "cyan",
    "ok": "green",
}


def show(report: Report, console: Console) -> None:
    """Prints the whole report."""
    console.print(Text(f"{report.program}  (ExecuTorch {report.executorch})"), soft_wrap=True)
    if report.bundle is not None:
        console.print(_bundle_line(report.bundle), highlight=False)
    console.print()
    console.print(_file(report))
    for method in report.methods:
        console.print(_method(method))
    if report.bundle is not None:
        console.print(_theta(report.bundle))
        console.print(_replay(report.bundle))
        console.print(_gate(report.bundle))
        console.print(_licences(report.bundle))
    console.print(_findings(report))


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _bundle_line(bundle: BundleReport) -> str:
    return escape(
        f"bundle {bundle.id[:12]}: {bundle.model}, preset {bundle.preset}, "
        f"{bundle.documents:,} documents, {size(bundle.bytes_per_round)} per round and "
        "device (theta down, update up)"
    )


def _file(report: Report) -> Table:
    frozen = sum(part.bytes for part in report.parts if part.frozen)
    title = f"File: {size(report.file_bytes)}, {frozen / report.file_bytes:.1%} weights"
    table = _table(title, "part", "size", "share", right=("size", "share"))
    for part in report.parts:
        share = part.bytes / report.file_bytes
        table.add_row(part.name, size(part.bytes), f"{share:.1%}")
    return table


def _method(method: MethodReport) -> RenderableType:
    facts = Table.grid(padding=(0, 1))
    facts.add_column(width=9)
    facts.add_column(overflow="fold")
    for name, value in _facts(method):
        facts.add_row(name, Text(value))
    parts: list[RenderableType] = [Text(f"Method {method.name}", style="bold"), facts]
    if method.failed is not None:
        parts.append(Text(f"does not run: {method.failed}", style="bold red"))
    if method.measured is not None:
        parts += ["", _kernels(method.measured)]
        if method.measured.delegates:
            parts.append(_delegates(method.measured))
    else:
        parts.append("")
    return Group(*parts)


def _facts(method: MethodReport) -> Iterator[tuple[str, str]]:
    yield "takes", ", ".join(map(_tensor, method.inputs))
    yield "returns", ", ".join(map(_tensor, method.outputs))
    if method.bounds:
        bounds = (f"{name} {bound.min:,} to {bound.max:,}" for name, bound in method.bounds.items())
        yield "bounds", ", ".join(bounds)
    delegates = [f"{d.calls} x {d.backend}" for d in method.delegates] or ["none"]
    operators = sum(o.calls for o in method.operators if not o.name.startswith("executorch_prim"))
    yield "calls", f"delegates: {', '.join(delegates)}; {operators} operators outside of them"
    arena = method.arena
    yield "arena", f"{size(arena.bytes)}, at most {size(arena.most_in_use_bytes)} in use at once"
    if method.measured is not None:
        yield from _cost(method.measured)


def _cost(measured: Measured) -> Iterator[tuple[str, str]]:
    time = duration(measured.milliseconds)
    yield "time", f"{time}, median of {measured.repeats} calls, {measured.threads} threads"
    opening = size(measured.opening_bytes)
    yield "memory", f"{size(measured.memory_bytes)} anonymous, and {opening} to open the program"
    line = measured.roofline
    if line is None:
        return
    which = "products by frozen weights" if line.counted == "frozen" else "products"
    kernels = line.kernels_share_of_peak
    least = f"at least {duration(line.least_milliseconds)} at {line.peak_gflops:,.0f} GFLOP/s"
    yield "roofline", f"{line.products} {which}, {line.gigaflop:,.3g} GFLOP: {least}"
    reached = f"{line.achieved_gflops:,.3g} GFLOP/s ({line.share_of_peak:.0%} of the peak)"
    alone = "" if kernels is None else f", the products' kernels {kernels:.0%}"
    yield "", f"the call reaches {reached}{alone}"
    if line.uncounted:
        yield "", f"not counted: {line.uncounted} (convolutions, or of unknown sizes)"


def _tensor(tensor: TensorFacts) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    dtype = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    dynamic = tensor.dynamic and all(isinstance(size, int) for size in tensor.shape)
    return f"{tensor.name or ''}[{'at most ' if dynamic else ''}{shape}{dtype}]"


def _kernels(measured: Measured) -> Table:
    columns = ("share", "ms", "calls", "kernel", "where")
    title = f"Time under ETDump: {duration(measured.etdump_milliseconds)}"
    table = _table(title, *columns, right=("share", "ms", "calls"))
    shown = [k for k in measured.kernels if k.share >= _SHOWN_SHARE][:_SHOWN_KERNELS]
    for kernel in shown:
        table.add_row(
            f"{kernel.share:.1%}",
            f"{kernel.milliseconds:.3f}",
            f"{kernel.calls}",
            Text(kernel.name),
            kernel.backend or "no delegate",
        )
    others = measured.kernels[len(shown) :]
    if others:
        table.add_row(
            f"{sum(k.share for k in others):.1%}",
            f"{sum(k.milliseconds for k in others):.3f}",
            f"{sum(k.calls for k in others)}",
            f"{len(others)} other kernels",
            "",
        )
    table.add_row(
        f"{measured.rest_share:.1%}",
        f"{measured.rest_share * measured.etdump_milliseconds:.3f}",
        "",
        "in no kernel: entering, sizes, recording",
        "",
    )
    return table


def _delegates(measured: Measured) -> Table:
    table = _table("Slowest delegates", "share", "ms", "made from", right=("share", "ms"))
    for delegate in measured.delegates[:_SHOWN_DELEGATES]:
        counts = Counter(name.split(".")[-2] for name in delegate.operators)
        shown = counts.most_common(_SHOWN_SOURCES)
        others = len(delegate.operators) - sum(count for _, count in shown)
        made = ", ".join(f"{count} {name}" for name, count in shown)
        table.add_row(
            f"{delegate.share:.1%}",
            f"{delegate.milliseconds:.3f}",
            Text(made + (f", {others} others" if others else "")),
        )
    return table


def _theta(bundle: BundleReport) -> Table:
    total = sum(segment.values for segment in bundle.theta)
    title = f"Theta: {total:,} values; gradient over the golden step"
    columns = ("segment", "shape", "values", "scale", "largest gradient", "exactly 0")
    table = _table(title, *columns, right=columns[2:])
    for segment in bundle.theta:
        known = segment.gradient_largest is not None and segment.gradient_zeros is not None
        table.add_row(
            segment.name,
            " x ".join(map(str, segment.shape)),
            f"{segment.values:,}",
            f"{segment.scale:g}",
            f"{segment.gradient_largest:.2e}" if known else "not known",
            f"{segment.gradient_zeros:.1%}" if known else "not known",
        )
    return table


def _replay(bundle: BundleReport) -> Table:
    at_export = {
        "loss": bundle.parity.loss_error,
        "gradient": bundle.parity.gradient_error,
        "scores": bundle.parity.scores_error,
        "embeddings": bundle.parity.embed_error,
    }
    title = "Parity: errors against eager PyTorch, as shares of the largest value"
    columns = ("result", "golden step, here", "tolerance", "gate, at export", "")
    table = _table(title, *columns, right=columns[1:4])
    for check in bundle.replay:
        table.add_row(
            check.name,
            "not finite" if check.error is None else f"{check.error:.1e}",
            f"{check.tolerance:.0e}",
            f"{at_export[check.name]:.1e}",
            Text("ok", style="green") if check.passed else Text("OUTSIDE", style="bold red"),
        )
    return table


def _gate(bundle: BundleReport) -> Table:
    title = f"The gate at export: gradient errors, of at most {bundle.parity.gate:.0e}"
    columns = ("rows", "length", "documents", "program", "eager float32, where above")
    table = _table(title, *columns, right=columns)
    for case in bundle.parity.cases:
        rounding = case.eager_float32_error
        table.add_row(
            str(case.batch),
            str(case.length),
            f"{case.documents:,}",
            f"{case.gradient_error:.1e}",
            "" if rounding is None else f"{rounding:.1e}",
        )
    return table


def _licences(bundle: BundleReport) -> Table:
    table = _table("Licences", "applies to", "licence", "revision", "notice")
    for licence in bundle.licences:
        notice = " ".join(licence.notice.split())
        table.add_row(
            Text(licence.applies_to),
            Text(licence.licence),
            Text(licence.revision or ""),
            Text(_cut(notice, longest=60)),
        )
    return table


def _findings(report: Report) -> RenderableType:
    parts: list[RenderableType] = [Text("Findings", style="bold")]
    parts += [_finding(finding) for finding in report.findings]
    return Group(*parts)


def _finding(finding: Finding) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_column(width=8)
    line.add_column(overflow="fold")
    style = _STYLES[finding.severity]
    if finding.severity == "ok":
        line.add_row(Text("ok", style=style), Text(finding.what))
        return line
    line.add_row(Text(finding.severity, style=style), Text(finding.what, style="bold"))
    line.add_row("", Text(finding.why))
    line.add_row("", Text(f"-> {finding.do}", style=style))
    return line


def size(count: int) -> str:
    """Bytes in a unit that a reader can take in; units of powers of 1,000."""
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"


def duration(milliseconds: float) -> str:
    """Milliseconds, or microseconds where these are less than a tenth."""
    if milliseconds >= 0.1:  # noqa: PLR2004  as the docstring says
        return f"{milliseconds:,.2f} ms"
    return f"{1000 * milliseconds:,.1f} µs"


def _cut(text: str, *, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
