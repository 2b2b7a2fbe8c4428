"""The demo, shortened, from nothing to its report; and stopped in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from carpool.errors import ConfigError
from carpool_sim.demo import plan, run_demo
from carpool_sim.report import Comparison, Report

SHORT = ("--set", "rounds=2", "--set", "cohort.expected_size=3.0")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # an export and four starts of Ray
def test_demo_ends_in_a_report_and_goes_on_where_it_was(
    carpool: Callable[..., str], tmp_path: Path
) -> None:
    """Data, export, three runs and report; without its report and last run it makes just these."""
    out = tmp_path / "demo"
    printed = carpool("demo", "--out", str(out), *SHORT, cwd=tmp_path)
    report = Report.model_validate_json((out / "report.json").read_bytes())
    rows = [
        "BM25",
        "zero-shot",
        "head only, federated",
        "adapter + head, federated",
        "adapter + head, central privacy",
    ]
    assert list(report.systems) == rows
    assert all(row in printed for row in rows)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"| {row} |" in text for row in rows)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    head_only, plain, private = report.trainings.values()
    assert head_only.config.local.train == ("head",)
    assert head_only.trained_values == 17_750 - 768
    assert (plain.epsilon, plain.noise_multiplier) == (None, 0)
    assert private.epsilon is not None
    assert private.epsilon <= 8
    assert [point.round_number for point in plain.curve] == [0, 2]

    bundle = (out / "bundle" / "manifest.json").stat().st_mtime_ns
    (out / "report.json").unlink()
    for file in (out / "adapter-head-central").iterdir():
        file.unlink()
    carpool("demo", "--out", str(out), *SHORT, cwd=tmp_path)
    again = json.loads((out / "report.json").read_bytes())
    assert again["trainings"]["adapter + head, federated"] == json.loads(plain.model_dump_json())
    assert (out / "bundle" / "manifest.json").stat().st_mtime_ns == bundle


def test_a_bundle_of_another_preset_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    """One preset's settings would train the other's bundle."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "summary.json").write_bytes(b"{}")
    (tmp_path / "bundle").symlink_to(small_bundle)
    with pytest.raises(ConfigError) as caught:
        run_demo(tmp_path, preset="paper", say=lambda _: None)
    assert str(caught.value) == (
        f"{tmp_path / 'bundle'}: expected a bundle of preset paper, got one of small. Choose "
        "another folder for the demo."
    )


def test_a_budget_is_the_private_runs_alone() -> None:
    """The others have no privacy mode to spend it in."""
    *plain, private = plan("small", overrides=("privacy.epsilon=4.0", "rounds=7")).values()
    assert private.config.privacy.epsilon == 4.0
    assert [run.config.privacy.mode for run in plain] == ["none", "none"]
    assert {run.config.rounds for run in (*plain, private)} == {7}


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.03, 0.01, 0.05), "better"),
        ((-0.03, -0.05, -0.01), "worse"),
        ((0.03, -0.01, 0.07), "not shown to differ"),
        ((0.0, 0.0, 0.0), "not shown to differ"),
    ],
)
def test_verdict_needs_the_whole_interval_on_one_side(
    interval: tuple[float, float, float], verdict: str
) -> None:
    """A report says "better" only where the interval of the paired difference excludes 0."""
    comparison = Comparison.model_validate(
        {"system": "a", "against": "b", "metric": "acc@1", "difference": interval}
    )
    assert comparison.verdict == verdict
