"""The wheel, outside the checkout, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _ok(*command: str, cwd: Path) -> str:
    done = _run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(
    repository: Path, tmp_path: Path, small_bundle: Path
) -> None:
    """Alone it is the contract, and names the extra for the rest; with the extras it all runs."""
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    _ok(*build, str(repository), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    _ok(sys.executable, "-m", "uv", "venv", "--python", sys.executable, "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    command = tmp_path / "env" / "bin" / "carpool"
    install = (sys.executable, "-m", "uv", "pip", "install", "--python", str(python))
    locked = ("--constraint", str(repository / "requirements" / "lock.txt"))
    _ok(*install, *locked, str(wheel), cwd=tmp_path)

    assert "data" in _ok(str(command), "--help", cwd=tmp_path)
    refused = _run(str(command), "selftest", str(small_bundle), cwd=tmp_path)
    assert refused.returncode == 2
    assert "pip install 'carpool[device]'" in refused.stderr

    # the extras' packages come from this environment, carpool itself from the wheel alone
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (site / "extras.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import carpool, carpool_device, carpool_export, carpool_server, "
        "carpool_sim; from carpool_sim.settings import packaged_settings; "
        "print(carpool_sim.__file__, packaged_settings('small').rounds)"
    )
    where, rounds = _ok(str(python), "-W", "ignore", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert int(rounds) >= 30
    assert "ok" in _ok(str(command), "selftest", str(small_bundle), cwd=tmp_path)
