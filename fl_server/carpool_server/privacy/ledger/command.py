"""``carpool privacy ledger``: verifies a ledger and prints it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from carpool.console import result_console
from carpool.errors import PrivacyError
from carpool_server.privacy.accounting.releases import rounded_up

# The accountants take seconds to import, so the command does it itself.
if TYPE_CHECKING:
    from carpool_server.privacy.ledger import Book


def ledger(
    path: Annotated[
        Path,
        typer.Argument(metavar="LEDGER", help="A ledger file, or the folder of a run with one."),
    ],
    *,
    counts: Annotated[
        bool,
        typer.Option(
            "--counts",
            help="Show how many devices each release holds: for the operator's eyes alone.",
        ),
    ] = False,
) -> None:
    """Verify a privacy ledger's chain and print what was promised, charged and released."""
    from carpool_server.privacy.ledger import LEDGER_NAME, read_ledger  # noqa: PLC0415

    file = path / LEDGER_NAME if path.is_dir() else path
    book, torn = read_ledger(file)
    if book.promise is None:
        raise PrivacyError(f"{file}: expected a ledger with a promise, got one without a line.")
    console = result_console()
    console.print(_table(book, counts=counts))
    promise, spent = book.promise, book.spent()
    lines = [
        f"population: {promise.population}",
        f"unit: {promise.unit}",
        (
            f"spent: epsilon {rounded_up(spent.value, 4)} of {promise.epsilon:g} at delta "
            f"{promise.delta:g} ({spent.describe()})"
        ),
    ]
    if promise.max_participations is not None:
        lines.append(f"cap: {promise.max_participations} rounds for each device")
    lines.append(
        f"chain: {len(book.hashes)} lines, all hashes right; the last is {book.hashes[-1]}"
    )
    if torn:
        lines.append(
            f"an unfinished last line of {torn} bytes is left out: whoever wrote it was killed "
            "before anything that it stood for was acknowledged"
        )
    if not counts:
        lines.append("devices in a release: not shown, since who knows them learns who took part")
    for line in lines:
        typer.echo(line)


def _table(book: Book, *, counts: bool) -> Table:
    released = {(r.run_id, r.round_number): r for r in book.releases}
    table = Table(title=f"{book.path}")
    columns = ["run", "round", "noise multiplier", "rate", "clip", "sigma", "epsilon", "charged"]
    for column in [*columns, "released", *(("devices", "most rounds") if counts else ())]:
        table.add_column(column, overflow="fold")
    for charged in book.charges:
        charge = charged.charge
        mark = released.get((charge.run_id, charge.round_number))
        cells = [
            charge.run_id[:8],
            str(charge.round_number),
            f"{charge.noise_multiplier:.4f}",
            f"{charge.sampling_rate:.4f}",
            f"{charge.clip_norm:.4g}",
            f"{charge.sigma:.4g}",
            rounded_up(charged.epsilon, 4),
            _seconds(charged.at),
            "no" if mark is None else f"{_seconds(mark.at)} as {mark.theta[:8]}",
        ]
        if counts:
            cells += (
                ["", ""]
                if mark is None
                else [f"{mark.contributors}", f"{mark.largest_participation}"]
            )
        table.add_row(*cells)
    return table


def _seconds(at: str) -> str:
    """A time without its fraction."""
    return f"{at[:10]} {at[11:19]}Z"
