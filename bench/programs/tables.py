"""Stored results as tables: for the terminal, and for ``docs/programs.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from bench.programs.names import CARPOOL, EAGER, HEAD_ONLY, L2_CLIP_NORM, PLAIN
from bench.programs.results import Results, ShapeResults, Timing, not_run
from carpool.errors import ConfigError

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""Around what is generated in a page."""

_RATIOS = ((CARPOOL, EAGER), (CARPOOL, PLAIN), (HEAD_ONLY, EAGER))


def shape_table(results: Results, at_shape: ShapeResults) -> Table:
    """Every variant at one shape."""
    table = Table(
        title=f"{results.model}, {results.preset}, {_shape_line(at_shape)}", title_justify="left"
    )
    table.add_column("side")
    table.add_column("variant")
    for name in ("threads", "ms", "of eager", "gradient off by", "loss off by", "setup, s"):
        table.add_column(name, justify="right")
    eager = at_shape.best(EAGER)
    for timing in at_shape.timings:
        if timing.median_seconds is None:
            table.add_row(timing.peer, timing.variant, str(timing.threads), "not run")
            continue
        table.add_row(
            timing.peer,
            timing.variant,
            str(timing.threads),
            milliseconds(timing.median_seconds),
            _share(timing, eager),
            f"{timing.gradient_difference:.0e}",
            f"{timing.loss_difference:.0e}",
            f"{timing.setup_seconds:.1f}",
        )
    return table


def summary_lines(results: Results) -> Iterator[str]:
    """The ratios that there are bars for, then what did not run and why."""
    for one, other in _RATIOS:
        ratios = [
            f"{s.shape} {ratio:.3f}"
            for s in results.shapes
            if (ratio := s.ratio(one, other)) is not None
        ]
        if ratios:
            yield f"{one} / {other}: {', '.join(ratios)}"
    yield from _reasons(results)
    yield how_measured(results)


def how_measured(results: Results) -> str:
    """Machine, versions and settings, in a sentence or two."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.processor}, {machine.cores} cores, load {machine.load:.2f} before; "
        f"{results.threads} threads (PyTorch: also 1), {results.clock} time, "
        f"medians of {results.repeats} turns in one process; rows of {results.shortest:.0%} to "
        f"100% of the length; clip {L2_CLIP_NORM:g}. {versions}."
    )


def markdown(results: Results, picture: str) -> str:
    """A section of the page: times, ratios, what did not run, how it was measured.

    Args:
        results: of one run.
        picture: the plot's file name.
    """
    shapes = results.shapes
    header = ["step, ms (share of eager)", *(f"{s.shape}" for s in shapes)]
    rows = [[peer, *(_cell(s, peer) for s in shapes)] for peer in results.peers]
    ratios = [
        [
            f"{one} / {other}",
            *("" if (r := s.ratio(one, other)) is None else f"{r:.3f}" for s in shapes),
        ]
        for one, other in _RATIOS
    ]
    variants = [
        ["fastest eager", *(_variant(s.best(EAGER)) for s in shapes)],
        ["real tokens", *(f"{s.real_tokens:.0%}" for s in shapes)],
    ]
    parts = [
        f"## {results.model}, preset `{results.preset}`",
        f"{results.documents:,} documents, {results.trained_values:,} trained values.",
        _table(header, [*rows, *(r for r in ratios if any(r[1:])), *variants]),
        f"![step time by length and batch]({picture})",
        "\n".join(f"- {line}" for line in _reasons(results)),
        how_measured(results),
    ]
    return "\n\n".join(part for part in parts if part)


def replace_generated(page: str, generated: str) -> str:
    """The page with what stands between the markers replaced.

    Raises:
        ConfigError: it does not have each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"expected a page with {BEGIN} and then {END}, once each.")
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def milliseconds(seconds: float) -> str:
    """With three digits or so."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004  digits


def _shape_line(at_shape: ShapeResults) -> str:
    return f"{at_shape.shape}, {at_shape.real_tokens:.0%} real tokens"


def _share(timing: Timing, eager: Timing | None) -> str:
    if eager is None or not eager.median_seconds or timing.median_seconds is None:
        return ""
    share = timing.median_seconds / eager.median_seconds
    return f"{share:.2f}" if share < 10 else f"{share:.0f}"  # noqa: PLR2004  digits


def _cell(at_shape: ShapeResults, peer: str) -> str:
    best = at_shape.best(peer)
    if best is None or best.median_seconds is None:
        return "not run"
    share = _share(best, at_shape.best(EAGER))
    return milliseconds(best.median_seconds) + (f" ({share})" if share else "")


def _variant(timing: Timing | None) -> str:
    if timing is None:
        return ""
    return f"{timing.variant.removesuffix(' attention')}, {timing.threads}"


def _reasons(results: Results) -> Iterator[str]:
    for (peer, variant, reason), shapes in not_run(results.shapes).items():
        where = ", ".join(map(str, shapes)) if len(shapes) < len(results.shapes) else "any shape"
        name = f"{peer}, {variant}" if variant else peer
        yield f"{name}: not run at {where}: {reason}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
