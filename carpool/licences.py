"""Licences as SPDX expressions, which tools can read."""

from __future__ import annotations

import re

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from carpool.errors import ConfigError

NOT_STATED = "NOASSERTION"
"""SPDX's word for: nobody said."""


def spdx_expression(text: str) -> str:
    """The expression as SPDX writes it: ``apache-2.0`` becomes ``Apache-2.0``.

    Args:
        text: an SPDX expression in any case, ``LicenseRef-NAME`` for a licence that SPDX does not
            list, or ``NOASSERTION``.

    Raises:
        ValueError: it is none of these.
    """
    if text == NOT_STATED:
        return text
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression as error:
        raise ValueError(
            f"expected an SPDX expression (Apache-2.0), LicenseRef-NAME for a licence that SPDX "
            f"does not list, or {NOT_STATED} for one that nobody states, got {text!r}"
        ) from error


def stated_licence(option: str, text: str | None) -> str | None:
    """``spdx_expression`` of what was given to an option, or None where nothing was.

    Raises:
        ConfigError: it is no SPDX expression; names option and value.
    """
    try:
        return None if text is None else spdx_expression(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}.") from error


def spdx_of_card(text: str) -> str:
    """What a model card says as an SPDX expression: ``gemma`` becomes ``LicenseRef-gemma``."""
    try:
        return spdx_expression(text)
    except ValueError:
        return "LicenseRef-" + re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
