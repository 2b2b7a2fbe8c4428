"""A plan as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carpool_server.privacy.accounting import Epsilon
from carpool_server.privacy.planning.evidence import BANDS, MEASURED
from carpool_server.privacy.planning.output import label
from carpool_server.privacy.planning.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTS_PER_INCH = 150
_COLOURS = ("tab:green", "tab:orange", "tab:red")
_MARKERS = {50: "o", 1000: "s", 5000: "^"}
_RATIOS = (0.01, 100.0)
"""The axis, where the plan is within it."""


def plot_plan(plan: Plan, epsilons: Sequence[tuple[int, Epsilon]], path: Path) -> None:
    """Epsilon over rounds, and the plan's noise among what was measured. Writes a PNG."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and only needed here

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    note = label(plan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    _draw_epsilon(left, plan, epsilons, projected=note is not None)
    _draw_noise(right, plan)
    figure.legend(fontsize=8, loc="outside lower center", ncol=4, frameon=False)
    if note is not None:
        figure.suptitle(note[0].upper() + note[1:], fontsize=10, color="tab:red")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    plt.close(figure)


def _draw_epsilon(
    axes: Axes, plan: Plan, epsilons: Sequence[tuple[int, Epsilon]], *, projected: bool
) -> None:
    axes.plot(
        [rounds for rounds, _ in epsilons],
        [epsilon.value for _, epsilon in epsilons],
        marker="o",
        markersize=4,
    )
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"epsilon at delta {plan.delta:g}" + (", projected" if projected else ""))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(
        f"noise multiplier {plan.noise_multiplier:.3f}, cohort {plan.noise_cohort:,.0f} of "
        f"{plan.noise_population:,}, {plan.regime}",
        fontsize=9,
    )


def _draw_noise(axes: Axes, plan: Plan) -> None:
    """What was measured, in the bands taken from it, and where this plan is."""
    ratio = plan.noise_to_signal
    left, right = min(_RATIOS[0], ratio / 2), max(_RATIOS[1], ratio * 2)
    start = left
    for band, colour in zip(BANDS, _COLOURS, strict=True):
        end = min(band.up_to, right)
        axes.axvspan(start, end, color=colour, alpha=0.12, linewidth=0)
        middle = math.sqrt(start * end)
        axes.text(middle, 0.03, band.name, ha="center", fontsize=8, color=colour)
        start = end
    for cohort, marker in _MARKERS.items():
        cells = [cell for cell in MEASURED if cell.cohort == cohort]
        axes.scatter(
            [cell.noise_to_signal for cell in cells],
            [cell.kept for cell in cells],
            s=20,
            marker=marker,
            color="black",
            label=f"measured, noise of a cohort of {cohort:,}",
            zorder=3,
        )
    name = f"this plan: {ratio:.3g}"
    axes.axvline(ratio, ymin=0.08, color="tab:blue", linewidth=2, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("a round's noise / largest mean")
    axes.set_ylabel("gain over zero-shot that was kept")
    axes.set_title("measured: ATT&CK, MiniLM, 60 rounds, one seed", fontsize=9)
    axes.grid(alpha=0.3)
