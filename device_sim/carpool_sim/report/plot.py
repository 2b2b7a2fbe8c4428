"""The curve per round, as a picture."""

from __future__ import annotations

from pathlib import Path

from carpool_device.evaluation.report import BM25
from carpool_sim.report.model import Report

_DOTS_PER_INCH = 150


def plot_curve(report: Report, path: Path) -> None:
    """Draws accuracy by round for every run, with BM25 as a line across.

    Round 0 is the untrained model, that is zero-shot. Writes a PNG to ``path``.
    """
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and only needed here

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, training), marker in zip(report.trainings.items(), "os^Dvx", strict=False):
        rounds = [point.round_number for point in training.curve]
        axes.plot(
            rounds, [p.accuracy for p in training.curve], marker=marker, markersize=4, label=name
        )
    axes.axhline(
        report.curve_baseline,
        color="grey",
        linestyle="--",
        linewidth=1,
        label=f"{BM25} (no training)",
    )
    axes.set_xlabel("round (0: untrained, nearest document by cosine)")
    axes.set_ylabel("acc@1")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"preset {report.preset}: {report.curve_queries:,} queries of {report.curve_clients:,} "
        f"{report.split} clients",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    plt.close(figure)
