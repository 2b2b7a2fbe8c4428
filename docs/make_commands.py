"""Writes docs/commands.md from the command line itself: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from carpool.cli import build_app

if TYPE_CHECKING:
    import click

TARGET = Path(__file__).parent / "commands.md"


def text() -> str:
    """The whole page: a section per command, a row per argument and option."""
    root = typer.main.get_command(build_app())
    sections = [
        "# Commands",
        "Made from the command line by `make docs`; a test fails when it is out of date.",
        *_sections("carpool", root),
    ]
    return "\n\n".join(sections) + "\n"


def _sections(name: str, command: click.Command) -> Iterator[str]:
    children: dict[str, click.Command] = getattr(command, "commands", {})
    if children:
        for child in sorted(children):
            yield from _sections(f"{name} {child}", children[child])
        return
    parameters = [p for p in command.params if p.name != "help"]
    usage = " ".join(_usage(p) for p in parameters if p.param_type_name == "argument")
    yield f"## `{name} {usage}`".replace(" `", "`", 0) if usage else f"## `{name}`"
    yield (command.help or "").strip()
    rows = [_row(parameter) for parameter in parameters]
    if rows:
        yield "\n".join(["| argument or option | default | what it is |", "|---|---|---|", *rows])


def _usage(parameter: click.Parameter) -> str:
    return parameter.human_readable_name.upper()


def _row(parameter: click.Parameter) -> str:
    if parameter.param_type_name == "argument":
        name, default = f"`{_usage(parameter)}`", "required"
    else:
        flags = "/".join([*parameter.opts, *parameter.secondary_opts])
        takes = "" if getattr(parameter, "is_flag", False) else f" {_value_name(parameter)}"
        name = f"`{flags}{takes}`"
        default = "required" if parameter.required else _default(parameter.default)
    return f"| {name} | {default} | {getattr(parameter, 'help', None) or ''} |"


def _value_name(parameter: click.Parameter) -> str:
    choices = getattr(parameter.type, "choices", None)
    if choices:
        return "\\|".join(str(getattr(c, "value", c)) for c in choices)
    return str(parameter.metavar or parameter.type.name.upper())


def _default(value: Any) -> str:  # noqa: ANN401  whatever an option's default is
    if value is None or value is False or value == [] or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
