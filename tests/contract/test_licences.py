"""Licences: SPDX's own spelling, or a name that says there is none."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from carpool.bundle.manifest import Licence, licences_of_documents
from carpool.errors import ConfigError
from carpool.licences import spdx_expression, spdx_of_card, stated_licence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("MIT or cc-by-4.0", "MIT OR CC-BY-4.0"),
        ("LicenseRef-ATTACK", "LicenseRef-ATTACK"),
        ("NOASSERTION", "NOASSERTION"),
    ],
)
def test_an_expression_is_spelled_as_spdx_does(text: str, expected: str) -> None:
    """Spellings from SPDX's list."""
    assert spdx_expression(text) == spdx_of_card(text) == expected


@pytest.mark.parametrize("text", ["Apache", "", "see notice", "MIT OR"])
def test_what_is_none_is_named(text: str) -> None:
    """With what was expected."""
    with pytest.raises(ValueError, match=rf"^expected an SPDX expression .*, got '{text}'$"):
        spdx_expression(text)
    with pytest.raises(ConfigError, match=r"^--model-licence: expected an SPDX expression"):
        stated_licence("--model-licence", text)


@pytest.mark.parametrize(
    ("card", "expected"),
    [("gemma", "LicenseRef-gemma"), ("bigscience-openrail_m", "LicenseRef-bigscience-openrail-m")],
)
def test_what_a_card_calls_by_another_name_gets_a_reference(card: str, expected: str) -> None:
    """And that is an expression."""
    assert spdx_of_card(card) == expected == spdx_expression(expected)


def test_a_manifest_has_one_spelling() -> None:
    """Else two manifests that say the same would have two ids."""
    with pytest.raises(ValidationError, match=r"expected 'Apache-2\.0', got 'apache-2\.0'"):
        Licence(applies_to="weights", licence="apache-2.0", revision=None, notice="")


def test_documents_have_an_entry_in_any_case() -> None:
    """A text each; without one, that nobody states it."""
    entries = licences_of_documents(["A", "B"], licence="MIT")
    assert [(entry.licence, entry.notice) for entry in entries] == [("MIT", "A"), ("MIT", "B")]
    assert [entry.licence for entry in licences_of_documents(["A"])] == ["LicenseRef-notice"]
    assert [entry.licence for entry in licences_of_documents([])] == ["NOASSERTION"]
