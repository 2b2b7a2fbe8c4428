"""Every dependency stands in docs/dependencies.md with a reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^- `(?P<name>[a-z0-9-]+)`: (?P<reason>.+)$", re.MULTILINE)


def required() -> dict[str, set[str]]:
    """Names by group as pyproject.toml has them, our own extras aside."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = {
        "core": content["project"]["dependencies"],
        "build": content["build-system"]["requires"],
        **content["project"]["optional-dependencies"],
        **content["dependency-groups"],
    }
    return {
        group: {re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0].lower() for r in requirements}
        - {"carpool"}
        for group, requirements in groups.items()
    }


def explained() -> dict[str, set[str]]:
    """Names by heading of the page."""
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `(.+)`.*$", text, flags=re.MULTILINE)[1:]
    return {
        heading: {match["name"] for match in LINE.finditer(body)}
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
    }


def test_every_dependency_has_its_reason_and_no_reason_is_left_over() -> None:
    """By group, both ways: a new dependency without a line fails, so does a stale line."""
    assert sum(map(len, required().values())) > 20
    assert explained() == required()
