"""The command and its Python form, with Flower's engine replaced by an in-process one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from round_kit import settings
from typer.testing import CliRunner, Result

from carpool.errors import ConfigError, RoundFailed
from carpool_server.hooks import RoundFacts
from carpool_server.in_process import LocalGrid, app_nodes
from carpool_sim import commands
from carpool_sim import federate as federation
from carpool_sim.progress import ProgressHook

SETTINGS = """
rounds = 3
seed = 5
privacy = {clip_norm = 0.5}
cohort = {expected_size = 8.0, deadline_seconds = 30.0, quorum = 0.5}
local = {learning_rate = 0.05, epochs = 1, batch_size = 4}
server = {kind = "sgd", learning_rate = 1.0}
"""


def context() -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs both apps in this process, and keeps what Flower would have been told."""
    told: dict[str, Any] = {}

    def simulate(
        *, server_app: ServerApp, client_app: ClientApp, num_supernodes: int, backend_config: object
    ) -> None:
        told.update(nodes=num_supernodes, backend=backend_config)
        server_app(LocalGrid(app_nodes(client_app, parts=num_supernodes)), context())

    monkeypatch.setattr(federation, "run_simulation", simulate)
    return told


@pytest.fixture
def command(tiny_bundle_path: Path, tiny_data_path: Path, tmp_path: Path):  # noqa: ANN201  a function
    """Runs ``federate`` with options; folder ``run`` in ``tmp_path``."""
    (tmp_path / "settings.toml").write_text(SETTINGS)
    app = typer.Typer()
    commands.register(app)

    def run(*options: str) -> Result:
        places = ["federate", str(tiny_bundle_path), str(tiny_data_path), str(tmp_path / "run")]
        named = ["--settings", str(tmp_path / "settings.toml")]
        return CliRunner().invoke(app, [*places, *named, *options])

    return run


@pytest.mark.usefixtures("engine")
def test_a_run_its_resume_and_its_finished_state(command: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """It names the last theta; a finished run says so; starting over it is refused."""
    first = command("--privacy", "none", "--keep-every", "2")
    assert first.exit_code == 0, first.output
    path = tmp_path / "run" / "theta-round-0003.safetensors"
    assert first.stdout == f"theta: {path}\n"
    kept = sorted(p.name for p in (tmp_path / "run").glob("theta-*"))
    assert kept == ["theta-round-0002.safetensors", "theta-round-0003.safetensors"]
    again = command("--privacy", "none", "--resume")
    assert again.stdout == (
        f"{tmp_path / 'run'}: the run is finished already; nothing was left to do.\ntheta: {path}\n"
    )
    over = command("--privacy", "none")
    assert "Add --resume to go on with it" in str(over.exception)


def test_the_privacy_mode_has_no_default(command: Any) -> None:  # noqa: ANN401
    """Neither file nor flag: refused before anything runs."""
    result = command()
    assert isinstance(result.exception, ConfigError)
    assert "privacy.mode: missing" in str(result.exception)


@pytest.mark.usefixtures("engine")
def test_central_says_what_was_spent_and_on_whom(command: Any) -> None:  # noqa: ANN401
    """Epsilon with its delta, unit and accountant; the real accountant runs."""
    result = command(
        *("--privacy", "central", "--set", "privacy.regime=poisson"),
        *("--set", "privacy.epsilon=8", "--set", "privacy.delta=1e-3"),
    )
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith(("privacy: epsilon 7.9", "privacy: epsilon 8.00"))
    assert last.endswith(
        " at delta 0.001 was spent; unit: one device, all of its text, over all rounds of all "
        "runs of the population (PRV (Opacus), Poisson-subsampled Gaussian, neighbouring: add or "
        "remove one client, upper bound)."
    )


def test_the_engine_gets_what_the_settings_say(
    engine: dict[str, Any], tiny_bundle_path: Path, tiny_data_path: Path, tmp_path: Path
) -> None:
    """A Ray of its own on this machine, or the cluster that is named."""
    for name, address in (("own", None), ("cluster", "head:6379")):
        simulation = {"aggregators": 3, "cpus_per_aggregator": 0.5, "ray_address": address}
        config = settings(rounds=1, cohort={"expected_size": 5.0}, simulation=simulation)
        federation.run(tiny_bundle_path, tiny_data_path, tmp_path / name, config)
        assert engine["nodes"] == 3
        assert engine["backend"]["client_resources"] == {"num_cpus": 0.5}
        arguments = engine["backend"]["init_args"]
        assert arguments["address"] == (address or "local")
        assert ("num_cpus" in arguments) == (address is None)
        assert arguments["log_to_driver"] is False


def test_an_engine_that_breaks_down_is_the_error_that_is_told(
    tiny_bundle_path: Path,
    tiny_data_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first cause, although the coordinator had to be stopped as well."""

    def breaking(*, server_app: ServerApp, **_: object) -> None:
        threading.Thread(target=server_app, args=(LocalGrid({}), context())).start()
        raise RuntimeError("Ending simulation.") from ValueError("no CPUs left")

    monkeypatch.setattr(federation, "run_simulation", breaking)
    with pytest.raises(RoundFailed) as caught:
        federation.run(tiny_bundle_path, tiny_data_path, tmp_path / "run", settings())
    assert str(caught.value) == (
        f"Flower's simulation engine stopped: no CPUs left. See {tmp_path / 'run' / 'flower.log'}; "
        "resume the run with --resume if it had begun."
    )


@pytest.mark.usefixtures("engine")
def test_a_stopped_command_exits_with_130(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """As Ctrl-C does, after one line that says how to go on."""
    jobs = []
    job = federation.Job

    def remember(**arguments: Any) -> federation.Job:  # noqa: ANN401
        jobs.append(job(**arguments))
        return jobs[-1]

    monkeypatch.setattr(federation, "Job", remember)

    def stop(_hook: object, _facts: RoundFacts) -> None:
        jobs[-1].stop.set()

    monkeypatch.setattr(ProgressHook, "after_round", stop)
    result = command("--privacy", "none")
    assert result.exit_code == 130
    assert "run: stopped as asked; resume it with --resume." in result.stderr.replace("\n", "")


def test_a_cohort_that_cannot_be_is_refused_before_the_engine_starts(
    tiny_bundle_path: Path, tiny_data_path: Path, tmp_path: Path
) -> None:
    """Ray takes long to start; a mistake in the settings is told first."""
    config = settings(cohort={"expected_size": 1000.0})
    with pytest.raises(ConfigError, match=r"^cohort\.expected_size: expected at most the populati"):
        federation.run(tiny_bundle_path, tiny_data_path, tmp_path / "run", config)
