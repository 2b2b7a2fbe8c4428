"""A report as Markdown, and its table for the terminal."""

from __future__ import annotations

from rich.table import Table

from carpool.schema import canonical_bytes
from carpool_device.evaluation.bootstrap import Interval
from carpool_device.evaluation.metrics import METRICS, Metric
from carpool_device.evaluation.report import ZERO_SHOT, as_table
from carpool_sim.report.model import Comparison, Report, Training

CURVE_NAME = "curve.png"


def as_markdown(report: Report) -> str:
    """The report, ready to read; every number in it stands in ``report.json`` too."""
    parts = [
        f"# Preset `{report.preset}`: {report.data.source}",
        (
            f"{report.queries:,} queries of {report.clients:,} {report.split} clients, none of "
            f"them trained on; {report.confidence:.0%} bootstrap intervals over clients in "
            "brackets."
        ),
        _systems(report),
        "## What can be said",
        "\n".join(f"- {sentence(comparison)}" for comparison in report.comparisons),
        (
            f"One run per row, one seed. The {report.split} clients were also used to choose the "
            "settings, so the trained rows are a little too good; the test clients are untouched."
        ),
        (
            "Clients are what the data set groups its queries by (for ATT&CK: entities that "
            "analysts' reports are about), natural groups and not users."
        ),
        "## Over the rounds",
        f"![accuracy by round]({CURVE_NAME})",
        (
            f"On a fixed sample: {report.curve_queries:,} queries of {report.curve_clients:,} "
            f"{report.split} clients."
        ),
        "## The runs",
        _trainings(report),
        *(_privacy(name, training) for name, training in report.trainings.items()),
        "## Data",
        _counts(report),
        "## Settings, versions, machine",
        f"Bundle `{report.bundle_id}`. {report.processor}, {report.cores} cores.",
        *(_settings(name, training) for name, training in report.trainings.items()),
    ]
    return "\n\n".join(parts) + "\n"


def as_terminal_table(report: Report) -> Table:
    """The systems' table, for the end of the demo."""
    against: dict[str, dict[Metric, Interval]] = {
        comparison.system: {comparison.metric: comparison.difference}
        for comparison in report.comparisons
        if comparison.against == ZERO_SHOT and comparison.metric == "acc@1"
    }
    title = (
        f"preset {report.preset}: {report.queries:,} queries of {report.clients:,} "
        f"{report.split} clients, never trained on"
    )
    return as_table(report.systems, against, title=title)


def sentence(comparison: Comparison) -> str:
    """A comparison in words, for example "A is better than B: acc@1 +0.034 [+0.012, +0.057]"."""
    verdict = comparison.verdict
    words = verdict if verdict == "not shown to differ" else f"{verdict} than"
    link = "from" if verdict == "not shown to differ" else ""
    text = " ".join(filter(None, (comparison.system, "is", words, link, comparison.against)))
    return f"{text}: {comparison.metric} {_interval(comparison.difference, sign='+')}"


def _systems(report: Report) -> str:
    rows = [
        [name, *(_interval(metrics[metric]) for metric in METRICS)]
        for name, metrics in report.systems.items()
    ]
    return _table(["system", *METRICS], rows)


def _trainings(report: Report) -> str:
    rows = [
        [
            name,
            f"{training.config.rounds}",
            f"{training.config.cohort.expected_size:g} of {training.population:,}",
            f"{training.trained_values:,}",
            f"{training.seconds:.0f}",
            _megabytes(training.bytes_down, training.bytes_up),
        ]
        for name, training in report.trainings.items()
    ]
    return _table(
        [
            "run",
            "rounds",
            "expected cohort",
            "trained values",
            "seconds in rounds",
            "MB down / up, between coordinator and aggregators",
        ],
        rows,
    )


def _megabytes(*counts: int | None) -> str:
    told = [f"{count / 1e6:.1f}" for count in counts if count is not None]
    return " / ".join(told) or "not told"


def _privacy(name: str, training: Training) -> str:
    config = training.config
    if config.privacy.mode == "none":
        return f"**{name}**: privacy mode `none`. Nothing is promised."
    rate = config.cohort.expected_size / training.population
    return (
        f"**{name}**: privacy mode `{config.privacy.mode}`. {' '.join(training.statement)} Updates "
        f"are clipped to {config.privacy.clip_norm:g}, noise multiplier "
        f"{training.noise_multiplier:.3f}, each round's clients drawn by the server with "
        f"probability {rate:.4f} each. The operator sees updates; released are only noised sums. "
        "Choosing the settings is not charged."
    )


def _counts(report: Report) -> str:
    rows = [[name.strip(), f"{value:,}"] for name, value in report.data.counts.items()]
    for part, size in report.data.parts.items():
        rows.append([f"{part}: clients / examples", f"{size.clients:,} / {size.examples:,}"])
    return _table(["what", "how many"], rows)


def _settings(name: str, training: Training) -> str:
    config = canonical_bytes(training.config.model_dump(mode="json")).decode()
    versions = ", ".join(f"{package} {number}" for package, number in training.versions.items())
    return f"{name}: `{config}`\n\nVersions: {versions}. Theta: `{training.theta}`."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _interval(interval: Interval, *, sign: str = "") -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in interval)
    return f"{value} [{low}, {high}]"
