"""A plan as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from carpool_server.privacy.accounting import Epsilon
from carpool_server.privacy.planning.evidence import BANDS, MEASURED, SENSIBLE
from carpool_server.privacy.planning.output import label
from carpool_server.privacy.planning.plan import Plan

_DOTS_PER_INCH = 150
_COLOURS = ("tab:green", "tab:orange", "tab:red")
_RATIOS = (0.01, 100.0)


def plot_plan(plan: Plan, epsilons: Sequence[tuple[int, Epsilon]], path: Path) -> None:
    """Epsilon over rounds, and the plan's noise among what was measured. Writes a PNG."""
    import matplotlib as mpl  # noqa: PLC0415  slow to import, and only needed here

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.plot(
        [rounds for rounds, _ in epsilons],
        [epsilon.value for _, epsilon in epsilons],
        marker="o",
        markersize=4,
    )
    left.set_xlabel("rounds")
    note = label(plan)
    left.set_ylabel(f"epsilon at delta {plan.delta:g}" + ("" if note is None else ", projected"))
    left.set_xlim(left=0)
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.set_title(
        f"z = {plan.noise_multiplier:.3f}, cohort {plan.noise_cohort:,.0f} of "
        f"{plan.noise_population:,}, {plan.regime}",
        fontsize=9,
    )
    ratio = plan.noise_to_signal
    lowest, highest = min(_RATIOS[0], ratio / 2), max(_RATIOS[1], ratio * 2)
    edge = lowest
    for band, colour in zip(BANDS, _COLOURS, strict=True):
        end = min(band.up_to, highest)
        right.axvspan(edge, end, color=colour, alpha=0.12, label=band.name, linewidth=0)
        edge = end
    for (cohort, marker), size in zip({50: "o", 1000: "s", 5000: "^"}.items(), (20,) * 3):
        cells = [cell for cell in MEASURED if cell.cohort == cohort]
        right.scatter(
            [cell.noise_to_signal for cell in cells],
            [cell.kept for cell in cells],
            s=size,
            marker=marker,
            color="black",
            label=f"measured, noise of a cohort of {cohort:,}",
            zorder=3,
        )
    right.axvline(ratio, color="tab:blue", linewidth=2, label=f"this plan: {ratio:.2g}")
    right.set_xscale("log")
    right.set_xlim(lowest, highest)
    right.set_ylim(0, 1.05)
    right.set_xlabel("a round's noise / largest mean")
    right.set_ylabel("gain over zero-shot that was kept")
    right.set_title(f"ATT&CK, MiniLM, one seed; sensible up to {SENSIBLE.up_to:g}", fontsize=9)
    right.grid(alpha=0.3)
    right.legend(fontsize=7, loc="lower left")
    if note is not None:
        figure.suptitle(note[0].upper() + note[1:], fontsize=10, color="tab:red")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    plt.close(figure)
