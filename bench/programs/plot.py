"""Stored results as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.programs.results import Results, ShapeResults

_DOTS_PER_INCH = 130
_MARKERS = "osD^v<>PX"


def plot(results: Results, path: Path) -> None:
    """Draws each side's fastest variant against the length and against the batch; log scale.

    The batch that stays the same is the one with the most lengths, the larger one of equals;
    likewise the length. Writes a PNG to ``path``.
    """
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and only needed here

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    batch = _commonest([s.batch for s in results.shapes])
    length = _commonest([s.length for s in results.shapes])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    by_length = sorted((s for s in results.shapes if s.batch == batch), key=lambda s: s.length)
    by_batch = sorted((s for s in results.shapes if s.length == length), key=lambda s: s.batch)
    for axes, shapes, sizes, label in (
        (left, by_length, [s.length for s in by_length], f"longest row's tokens, {batch} rows"),
        (right, by_batch, [s.batch for s in by_batch], f"rows of up to {length} tokens"),
    ):
        for peer, marker in zip(results.peers, _MARKERS, strict=False):
            points = _points(shapes, sizes, peer)
            axes.plot(*points, marker=marker, markersize=5, linewidth=1.2, label=peer)
        axes.set_xlabel(label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.grid(which="both", alpha=0.25)
    left.set_ylabel("training step, ms")
    figure.suptitle(
        f"{results.model}, preset {results.preset}: {results.machine.processor}, "
        f"{results.threads} threads",
        fontsize=10,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    plt.close(figure)


def _points(
    shapes: Sequence[ShapeResults], sizes: Sequence[int], peer: str
) -> tuple[list[int], list[float]]:
    """Sizes and milliseconds where the side ran."""
    found = [
        (size, 1000 * best.median_seconds)
        for size, at_shape in zip(sizes, shapes, strict=True)
        if (best := at_shape.best(peer)) is not None and best.median_seconds is not None
    ]
    return [size for size, _ in found], [time for _, time in found]


def _commonest(values: Sequence[int]) -> int:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
