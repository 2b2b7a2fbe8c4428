"""What central privacy costs in accuracy: budgets, presets, and cohorts that are imagined.

    python bench/private_training.py DATA OUT [--preset small --preset paper] [--page FILE]

DATA is a data set's folder (``carpool data attack``), OUT a folder for bundles and runs; what is
there already is not made again. Every run is one seed of the shipped settings; the table is of
clients that were never trained on, on which the settings were chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from carpool.bundle import Bundle
from carpool.config import RunConfig
from carpool.data.dataset import DOCUMENTS_NAME
from carpool.progress import stages
from carpool_device.evaluation.report import ZERO_SHOT
from carpool_export.exporter import STAGES, export_bundle
from carpool_export.settings import ExportSettings
from carpool_export.trainables import preset_kinds
from carpool_server.privacy.accounting import rounded_up
from carpool_sim.demo import MODEL
from carpool_sim.report.measure import measure
from carpool_sim.report.model import Report, Training
from carpool_sim.settings import packaged_settings
from carpool_sim.shown import run_shown

PRESETS = ("small", "paper")
REPORT_NAME = "private-training-{}.json"

_IMAGINED = ((16_000, 1_000), (80_000, 5_000))
"""Populations and cohorts with the sampling rate of 50 of 801, rounded to thousands."""


def planned(preset: str) -> dict[str, RunConfig]:
    """The runs by name, in the table's order."""
    private = packaged_settings(f"{preset}-central")
    runs = {"no privacy": packaged_settings(preset)}
    for epsilon in (8, 2):
        runs[f"epsilon {epsilon}, the real population"] = packaged_settings(
            f"{preset}-central", overrides=(f"privacy.epsilon={epsilon}",)
        )
    for population, cohort in _IMAGINED:
        runs[f"PROJECTION: the noise of a cohort of {cohort:,} at epsilon 2"] = packaged_settings(
            preset,
            overrides=(
                "privacy.mode=projection",
                "privacy.epsilon=2",
                f"privacy.delta={private.privacy.delta}",
                f"privacy.clip_norm={private.privacy.clip_norm}",
                f"privacy.projection={{population={population}, cohort={cohort}}}",
            ),
        )
    return runs


def measured(preset: str, data: Path, out: Path) -> Report:
    """All runs of a preset, made where they are not there, and their table."""
    bundle_path = out / preset
    if not bundle_path.exists():
        settings = ExportSettings(kinds=preset_kinds(preset))
        with stages(f"export {preset}", total=len(STAGES)) as announce:
            export_bundle(MODEL, data / DOCUMENTS_NAME, bundle_path, settings, announce=announce)
    folders = {}
    for number, (name, config) in enumerate(planned(preset).items(), start=1):
        folder = folders[name] = out / f"{preset}-{number}"
        run_shown(bundle_path, data, folder, config, name=f"{preset}: {name}")
    bundle = Bundle.open(bundle_path)
    return measure(bundle, data, folders, compare=[(name, ZERO_SHOT) for name in folders])


def rows(report: Report) -> list[str]:
    """The table's rows of one preset."""
    lines = []
    for name in (ZERO_SHOT, *report.trainings):
        value, low, high = report.systems[name]["acc@1"]
        training = report.trainings.get(name)
        cells = [f"`{report.preset}`", name, f"{value:.3f} [{low:.3f}, {high:.3f}]"]
        lines.append(f"| {' | '.join([*cells, *_noise(training)])} |")
    return lines


def _noise(training: Training | None) -> list[str]:
    """Epsilon spent, noise multiplier, and noise to signal of a round's mean."""
    if training is None or training.noise_multiplier == 0:
        return ["", "", ""]
    config, imagined = training.config, training.config.privacy.projection
    cohort = config.cohort.expected_size if imagined is None else imagined.cohort
    ratio = training.noise_multiplier * training.trained_values**0.5 / cohort
    epsilon = "none achieved" if training.epsilon is None else rounded_up(training.epsilon, 2)
    return [epsilon, f"{training.noise_multiplier:.3f}", f"{ratio:.2f}"]


def page(reports: list[Report]) -> str:
    """The whole page."""
    first = reports[0]
    config = next(iter(first.trainings.values())).config
    table = "\n".join(line for report in reports for line in rows(report))
    return f"""# What central privacy costs

MITRE ATT&CK, all-MiniLM-L6-v2, {first.queries:,} queries of {first.clients} {first.split} clients
that were never trained on; {first.confidence:.0%} bootstrap intervals over clients in brackets. One
run per row, seed {config.seed}, {config.rounds} rounds, a Poisson cohort of
{config.cohort.expected_size:g} of {next(iter(first.trainings.values())).population} clients, delta
1e-5. The settings (`small`, `small-central`, `paper`, `paper-central`; projections train with those
of no privacy and the clip of `central`) were chosen on these clients, and that choice is charged
to no budget.

| preset | run | acc@1 | epsilon spent | noise multiplier | noise / signal |
|---|---|---:|---:|---:|---:|
{table}

Noise / signal is the length of the noise on a round's mean over the longest that the mean can
be: noise multiplier x sqrt(values) / cohort. A row marked PROJECTION trained 50 expected clients
with the noise that the stated, imagined cohort would share: it says what privacy would cost a
larger population, if its clients were like these, and is no guarantee for anybody.

```
carpool data attack build/attack
python bench/private_training.py build/attack build/private --page docs/private-training.md
```

{first.processor}, {first.cores} cores.
"""


def main() -> None:
    """Makes what is missing, prints the table, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", action="append", choices=PRESETS)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    reports = []
    for preset in arguments.preset or PRESETS:
        report = measured(preset, arguments.data, arguments.out)
        (arguments.out / REPORT_NAME.format(preset)).write_text(report.model_dump_json(indent=1))
        print("\n".join(rows(report)))
        reports.append(report)
    if arguments.page is not None:
        arguments.page.write_text(page(reports))


if __name__ == "__main__":
    main()
