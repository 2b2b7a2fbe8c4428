"""The settings that ship."""

from __future__ import annotations

import pytest

from carpool.errors import ConfigError
from carpool_sim.demo import plan
from carpool_sim.settings import find_settings, packaged_names, packaged_settings


@pytest.mark.parametrize("name", ["small", "small-central", "paper", "paper-central"])
def test_shipped_settings_are_valid_and_named_after_their_mode(name: str) -> None:
    """Every shipped file passes the schema, runs 30 rounds or more, and says what it promises."""
    config = packaged_settings(name)
    assert config.rounds >= 30
    assert config.privacy.mode == ("central" if name.endswith("-central") else "none")


def test_shipped_settings_are_all_tested() -> None:
    """A new file must be added to the test above, and to the option's help."""
    assert packaged_names() == ["paper", "paper-central", "small", "small-central"]


def test_unknown_settings_name_the_nearest() -> None:
    """A misspelt name gets a hint, a missing file its reason."""
    with pytest.raises(ConfigError) as caught:
        find_settings("smal")
    assert str(caught.value) == (
        "settings 'smal': expected a TOML file or the name of shipped settings; "
        "did you mean 'small'?"
    )
    with pytest.raises(ConfigError, match=r"^nowhere\.toml: expected a settings file, got"):
        find_settings("nowhere.toml")


def test_demo_compares_runs_that_differ_in_what_they_claim() -> None:
    """Head only moves the head alone; the private run has a budget; all have as many rounds."""
    head_only, both, private = plan("small").values()
    assert (head_only.config.local.train, both.config.local.train) == (
        ("head",),
        ("adapter", "head"),
    )
    assert head_only.config.model_copy(update={"local": both.config.local}) == both.config
    assert private.config.privacy.mode == "central"
    assert len({run.config.rounds for run in plan("small").values()}) == 1
