"""The arrows between the sides hold, and the contract stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HOMES = {
    "carpool": ROOT / "carpool",
    "carpool_export": ROOT / "export" / "carpool_export",
    "carpool_server": ROOT / "fl_server" / "carpool_server",
    "carpool_device": ROOT / "device_sim" / "carpool_device",
}
ALLOWED = {
    "carpool": {"carpool"},
    "carpool_export": {"carpool", "carpool_export"},
    "carpool_server": {"carpool", "carpool_server"},
    "carpool_device": {"carpool", "carpool_device"},
}
"""What joins the sides (carpool_sim, carpool_flower) sits on top and may import them all."""

FORBIDDEN = {
    "carpool": {"torch", "flwr", "executorch", "transformers", "opacus"},
    "carpool_device": {"flwr", "transformers", "sentence_transformers"},
    "carpool_server": {"executorch", "transformers"},
    "carpool_export": {"flwr", "opacus"},
}


def imported(source: str) -> set[str]:
    """The top-level names of everything that is imported anywhere in a module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def offences(side: str, source: str) -> set[str]:
    ours = {name for name in imported(source) if name.split("_")[0] == "carpool"}
    return (ours - ALLOWED[side]) | (imported(source) & FORBIDDEN[side])


@pytest.mark.parametrize("side", HOMES)
def test_each_side_imports_only_what_it_may(side: str) -> None:
    """Every module of the side is looked at, lazy imports inside functions included."""
    modules = sorted(HOMES[side].rglob("*.py"))
    found = {
        str(path.relative_to(ROOT)): bad
        for path in modules
        if (bad := offences(side, path.read_text(encoding="utf-8")))
    }
    assert modules
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import carpool_server.rounds",
        "from carpool_server import rounds",
        "def f():\n    from carpool_sim.demo import run",
        "if True:\n    import flwr.client as f",
    ],
)
def test_a_forbidden_import_is_found(line: str) -> None:
    """The check above can fail: at the top, from, in a function, under another name."""
    assert offences("carpool_device", line)
    assert not offences("carpool_device", "import carpool.theta, numpy\nfrom . import batches")


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_contract_loads_neither_torch_nor_flwr() -> None:
    """Every module of carpool in one process; what else they import is counted too."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(HOMES["carpool"].rglob("*.py"))
    ]
    loaded = modules_after("import " + ", ".join(n.removesuffix(".__init__") for n in names))
    assert "carpool" in loaded
    assert not loaded & FORBIDDEN["carpool"]


def test_help_loads_neither_torch_nor_flwr() -> None:
    """Start-up stays fast with every side installed: heavy imports wait for their command."""
    loaded = modules_after(
        "from carpool.cli import build_app\n"
        "try:\n    build_app()(['--help'])\nexcept SystemExit:\n    pass"
    )
    assert "typer" in loaded
    assert not loaded & {*FORBIDDEN["carpool"], "ray", "matplotlib", "scipy", "pandas"}
