"""Recipe and settings: what is refused, in which words; overrides; what a resume may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from carpool.config import RunConfig, changed_settings, load_config, parse_config
from carpool.errors import ConfigError
from carpool.recipe import PLAIN_GRADIENT_CLIP, LocalRecipe

SETTINGS = """\
rounds = 30
seed = 1
privacy = { mode = "none", clip_norm = 1.5 }
cohort = { expected_size = 40 }
local = { learning_rate = 0.5, epochs = 1 }
server = { kind = "adam", learning_rate = 0.01 }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(SETTINGS, encoding="utf-8")
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides=overrides)
    return str(caught.value)


def test_file_and_overrides_make_one_configuration(path: Path) -> None:
    """Values in TOML's syntax; what is no TOML is a string; the file's other values stay."""
    config = load_config(
        path,
        overrides=[
            "privacy.mode=central",
            "privacy.epsilon=8",
            "privacy.delta = 1e-5",
            "privacy.regime=poisson",
            "cohort.expected_size=50",
            'local.train=["head"]',
            "simulation.aggregators=5",
        ],
    )
    assert config.privacy.mode == "central"
    assert config.privacy.epsilon == 8.0
    assert config.privacy.delta == 1e-5
    assert config.privacy.clip_norm == 1.5
    assert config.cohort.expected_size == 50
    assert config.local.train == ("head",)
    assert config.simulation.aggregators == 5
    assert config.rounds == 30


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("round=3", "round: unknown field; did you mean 'rounds'?"),
        ("cohort.quorun=1", "cohort.quorun: unknown field; did you mean 'quorum'?"),
        (
            "server.momentun=1",
            (
                "server.adam.momentun: unknown field; known: beta1, beta2, hold, kind, "
                "learning_rate, tau"
            ),
        ),
        ("server.taux=1", "server.adam.taux: unknown field; did you mean 'tau'?"),
        (
            "simulation.zzz=1",
            "simulation.zzz: unknown field; known: aggregators, cpus_per_aggregator, ray_address",
        ),
        ("rounds=0", "rounds: Input should be greater than 0, got 0"),
        (
            "rounds=many",
            (
                "rounds: Input should be a valid integer, unable to parse string as an "
                "integer, got 'many'"
            ),
        ),
        ("cohort.quorum=1.5", "cohort.quorum: Input should be less than or equal to 1, got 1.5"),
        ("privacy.clip_norm=nan", "privacy.clip_norm: Input should be a finite number, got nan"),
        ("privacy.clip_norm=inf", "privacy.clip_norm: Input should be a finite number, got inf"),
        (
            "privacy.mode=secret",
            (
                "privacy.mode: Input should be 'none', 'central', 'example_level' or 'projection', "
                "got 'secret'"
            ),
        ),
        (
            "privacy.epsilon=8",
            (
                "privacy: mode 'none' promises nothing, so epsilon must be left out "
                "(or set mode = 'central')"
            ),
        ),
        (
            "privacy.mode=central",
            (
                "privacy: mode 'central' needs epsilon, delta, regime ('poisson' or "
                "'participation-cap')"
            ),
        ),
        (
            "privacy={mode='central', clip_norm=1.0, delta=1e-5, regime='poisson'}",
            "privacy: mode 'central' needs epsilon",
        ),
        (
            (
                "privacy={mode='central', clip_norm=1.0, epsilon=2, delta=1e-5, "
                "regime='participation-cap'}"
            ),
            "privacy: regime 'participation-cap' needs max_participations",
        ),
        (
            (
                "privacy={mode='central', clip_norm=1.0, epsilon=2, delta=1e-5, regime='poisson', "
                "max_participations=3}"
            ),
            "privacy: regime 'poisson' has no use for max_participations",
        ),
        (
            "privacy={mode='example_level', clip_norm=1.0, epsilon=2, delta=1e-5, metrics={}}",
            "privacy: mode 'example_level' needs max_participations",
        ),
        (
            (
                "privacy={mode='example_level', clip_norm=1.0, epsilon=2, delta=1e-5, "
                "max_participations=3, metrics={}}"
            ),
            "privacy: mode 'example_level' has no use for metrics",
        ),
        (
            (
                "privacy={mode='example_level', clip_norm=1.0, epsilon=2, delta=1e-5, "
                "max_participations=3}"
            ),
            "value: privacy.mode 'example_level' needs local.steps and local.example_clip_norm",
        ),
        (
            (
                "privacy={mode='projection', clip_norm=1.0, epsilon=2, delta=1e-5, "
                "projection={population=5, cohort=6}}"
            ),
            ("privacy.projection: expected a cohort of at most the population of 5, got 6"),
        ),
        ("privacy={clip_norm=1.0}", "privacy.mode: missing"),
        (
            "local.steps=3",
            "local: expected exactly one of epochs and steps, got epochs=1 and steps=3",
        ),
        (
            "local={learning_rate=1.0}",
            "local: expected exactly one of epochs and steps, got epochs=None and steps=None",
        ),
        ("local.train=[]", "local: expected one or two distinct groups to train, got ()"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(path: Path, override: str, reason: str) -> None:
    """The whole message: the file, the setting, what was expected and what was got."""
    assert refusal(path, override) == f"{path}: {reason}"


def test_every_mistake_is_named_at_once(path: Path) -> None:
    """One line each."""
    assert "seed: Input should be less than" in refusal(path, f"seed={2**53}")
    assert refusal(path, "rounds=0", "seed=-1").splitlines() == [
        f"{path}: rounds: Input should be greater than 0, got 0",
        "seed: Input should be greater than or equal to 0, got -1",
    ]


@pytest.mark.parametrize("override", ["rounds", "=3", " =3"])
def test_an_override_without_key_or_value_is_refused(path: Path, override: str) -> None:
    """With an example of how it should look."""
    assert refusal(path, override) == (
        f"expected key=value, got {override!r}; for example privacy.epsilon=8."
    )


def test_an_override_into_a_value_is_refused(path: Path) -> None:
    """A value has no settings inside."""
    assert refusal(path, "rounds.x=1") == "rounds.x: rounds is a value and not a section."


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    """Three ways of not being a settings file."""
    missing = tmp_path / "no.toml"
    assert refusal(missing) == (
        f"{missing}: expected a settings file, got: No such file or directory."
    )
    assert refusal(tmp_path) == f"{tmp_path}: expected a settings file, got: Is a directory."
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"rounds = \xff")
    assert refusal(broken).startswith(f"{broken}: expected TOML, got: ")
    broken.write_text("rounds =")
    assert refusal(broken).startswith(f"{broken}: expected TOML, got: ")


def test_privacy_mode_has_no_default() -> None:
    """Nobody runs without a guarantee by forgetting a line."""
    with pytest.raises(ConfigError, match="privacy: missing"):
        parse_config({"rounds": 1, "seed": 0}, source="flags")


def test_only_the_simulation_may_change_on_resume(path: Path) -> None:
    """Every other difference is named with old and new; the order is alphabetical."""
    before = load_config(path)
    assert changed_settings(before, before) == []
    assert changed_settings(before, load_config(path, overrides=["simulation.aggregators=9"])) == []
    other = load_config(path, overrides=["seed=2", "local.learning_rate=0.25", "server.tau=1.0"])
    assert changed_settings(before, other) == [
        "local.learning_rate: 0.5 -> 0.25",
        "seed: 1 -> 2",
        "server.tau: 0.0001 -> 1.0",
    ]


def test_another_server_optimiser_is_a_change(path: Path) -> None:
    """Settings that exist on one side alone are named too."""
    other = load_config(path, overrides=["server={kind='sgd', learning_rate=0.01}"])
    changes = changed_settings(load_config(path), other)
    assert "server.kind: 'adam' -> 'sgd'" in changes
    assert "server.momentum: None -> 0.0" in changes


def test_settings_survive_json(path: Path) -> None:
    """A checkpoint holds them as JSON."""
    config = load_config(path)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"momentum": 1}, "momentum\n  Extra inputs are not permitted"),
        ({"version": 2}, "version\n  Input should be 1"),
        ({"batch_size": 0}, "batch_size\n  Input should be greater than or equal to 1"),
        ({"train": ("head", "head")}, "expected one or two distinct groups to train"),
        ({"train": ("body",)}, "Input should be 'adapter' or 'head'"),
        ({"proximal_weight": -1.0}, "Input should be greater than or equal to 0"),
    ],
)
def test_a_recipe_of_another_kind_is_refused(change: dict[str, Any], reason: str) -> None:
    """A device never guesses what a field that it does not know might mean."""
    with pytest.raises(ValidationError) as caught:
        LocalRecipe.model_validate({"learning_rate": 0.1, "steps": 1} | change)
    assert reason in str(caught.value)


def test_without_an_example_bound_the_gradient_is_plain() -> None:
    """The bound is a finite float32, or the program would compute inf / norm."""
    assert LocalRecipe(learning_rate=0.1, steps=1).l2_clip_norm == PLAIN_GRADIENT_CLIP < 3.4e38
    assert LocalRecipe(learning_rate=0.1, steps=1, example_clip_norm=2.0).l2_clip_norm == 2.0
