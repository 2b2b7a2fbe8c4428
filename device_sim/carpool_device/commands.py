"""``carpool selftest``, ``carpool search`` and ``carpool evaluate``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from carpool.bundle import Bundle
from carpool.console import result_console
from carpool.data.corpus import read_notice
from carpool.data.dataset import Dataset
from carpool.errors import ConfigError
from carpool.files import make_folder, sha256_of_file, write_atomically
from carpool.licences import stated_licence
from carpool.progress import progress

# The runtime takes seconds to import, so each command does it itself, when it is run.
if TYPE_CHECKING:
    from carpool_device.evaluation import Queries, Ranking
    from carpool_device.runtime import DeviceProgram

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle, as `carpool export` writes it.")
]

EVALUATION_NAME = "evaluation.json"


def register(app: typer.Typer) -> None:
    """Adds the device's commands to ``app``."""
    app.command("selftest")(selftest)
    app.command("search")(search)
    app.command("evaluate")(evaluate)
    group = typer.Typer(help="Change a bundle.", no_args_is_help=True)
    group.command("add-documents")(add_documents)
    app.add_typer(group, name="bundle")


def selftest(bundle: BundleArgument) -> None:
    """Replay the bundle's golden step: does this device compute what the exporter did?"""
    from carpool_device.selftest import replay_golden_step, require_passed  # noqa: PLC0415

    program = _load(bundle)
    checks = replay_golden_step(program)
    table = Table(title=f"Golden step of bundle {program.bundle.id[:12]}")
    for column in ("result", "largest error", "tolerance", ""):
        table.add_column(column)
    table.add_row("token ids", "equal", "equal", "ok")
    for check in checks:
        verdict = "ok" if check.passed else "OUTSIDE"
        table.add_row(check.name, f"{check.error:.2g}", f"{check.tolerance:.2g}", verdict)
    result_console().print(table)
    require_passed(checks, program=program)


def add_documents(
    bundle: BundleArgument,
    documents: Annotated[
        Path, typer.Argument(help="JSON lines with the new documents: id, title, text.")
    ],
    out: Annotated[Path, typer.Argument(help="Where the new bundle shall be; must not exist.")],
    *,
    theta: Annotated[
        Path | None, typer.Option(help="A trained theta to ship; by default the bundle's own.")
    ] = None,
    notice: Annotated[
        list[Path] | None,
        typer.Option(help="A text that must go with the new documents. Repeatable."),
    ] = None,
    documents_licence: Annotated[
        str | None, typer.Option(help="The new documents' licence (SPDX).")
    ] = None,
) -> None:
    """Write a bundle with more documents: no export, no training, the same program.

    The untrained model embeds them, as it did the old ones; old scores stay as they are.
    """
    from carpool_device import catalogue  # noqa: PLC0415

    notices = [read_notice(path) for path in notice or []]
    made = catalogue.add_documents(
        bundle,
        documents,
        out,
        theta_path=theta,
        notices=notices,
        licence=stated_licence("--documents-licence", documents_licence),
    )
    typer.echo(f"{out}: bundle {made.id}, {made.manifest.documents.count:,} documents")


def search(
    bundle: BundleArgument,
    query: Annotated[str, typer.Argument(metavar="TEXT", help="What to search for.")],
    *,
    theta: Annotated[
        Path | None, typer.Option(help="A trained theta, to show its results beside.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many documents.")] = 5,
) -> None:
    """Search the bundle's documents, before training and, with --theta, after it."""
    from carpool_device.search import search as search_documents  # noqa: PLC0415

    opened = Bundle.open(bundle)
    trained = None if theta is None else opened.read_theta(theta)
    program = _load_opened(opened)
    before = search_documents(program, opened.initial_theta(), query, top=top)
    lists = [before]
    if trained is not None:
        lists.append(search_documents(program, trained, query, top=top))
    table = Table(title=escape(_one_line(query)))
    table.add_column("#", justify="right")
    for name in ("before training", "after training")[: len(lists)]:
        table.add_column("score", justify="right")
        table.add_column(name, overflow="fold")
    for rank, hits in enumerate(zip(*lists, strict=True), start=1):
        cells = [str(rank)]
        for hit in hits:
            cells += [
                f"{hit.score:.3f}",
                escape(f"{hit.document.title} ({hit.document.id})"),
            ]
        table.add_row(*cells)
    result_console().print(table)


def evaluate(
    bundle: BundleArgument,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A data set, as `carpool data` writes it.")
    ],
    *,
    theta: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A theta to evaluate; may be repeated."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="Whose clients' queries to ask.")
    ] = "validation",
    final_claims: Annotated[
        bool, typer.Option("--final-claims", help="Needed to look at the test clients.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"A folder to write {EVALUATION_NAME} to.")
    ] = None,
) -> None:
    """Compare BM25, nearest document by cosine (zero-shot) and trained thetas."""
    from carpool_device.evaluation import (  # noqa: PLC0415
        evaluate_bm25,
        prepare_queries,
    )
    from carpool_device.evaluation.report import (  # noqa: PLC0415
        BM25,
        ZERO_SHOT,
        Evaluation,
        as_table,
        differences_from,
        summarise_all,
    )

    console, errors = result_console(), Console(stderr=True)
    if split == "test":
        if not final_claims:
            raise ConfigError(
                "the test clients are to stay untouched until the final claims: what is chosen by "
                "looking at them is no longer measured by them. Use --split validation, or add "
                "--final-claims for the last table."
            )
        errors.print(
            "Test clients: for the final claims only. Choose nothing by these numbers.",
            style="yellow",
        )
    opened = Bundle.open(bundle)
    if out is not None:
        make_folder(out)
    files = _named_files(theta or [], taken=(BM25, ZERO_SHOT))
    thetas = {ZERO_SHOT: opened.initial_theta()}
    thetas |= {name: opened.read_theta(path) for name, path in files.items()}
    examples = Dataset.open(data).part(split)
    program = _load_opened(opened)
    queries = prepare_queries(program.tokenizer, program.document_index, examples)
    rankings: dict[str, Ranking] = {}
    with progress(BM25, total=len(queries.rows)) as bar:
        rankings[BM25] = evaluate_bm25(program.documents, examples, on_progress=bar.advance)
    for name, values in thetas.items():
        rankings[name] = _rank_with_progress(program, values, queries, name=name)
    result = Evaluation(
        bundle_id=opened.id,
        split=split,
        clients=len(queries.clients),
        queries=len(queries.rows),
        thetas={name: sha256_of_file(path) for name, path in files.items()},
        systems=summarise_all(rankings),
        against_zero_shot=differences_from(ZERO_SHOT, rankings),
        versions={
            package: importlib.metadata.version(package)
            for package in ("carpool", "executorch", "bm25s", "numpy", "tokenizers")
        },
    )
    title = f"{result.queries} queries of {result.clients} {split} clients"
    console.print(as_table(result.systems, result.against_zero_shot, title=title))
    if out is not None:
        path = out / EVALUATION_NAME
        write_atomically(path, (result.model_dump_json(indent=2) + "\n").encode())
        errors.print(f"Wrote {path}", soft_wrap=True, highlight=False, markup=False)


def _rank_with_progress(
    program: DeviceProgram, theta: NDArray[np.float32], queries: Queries, *, name: str
) -> Ranking:
    from carpool_device.evaluation import rank_queries  # noqa: PLC0415

    with progress(name, total=len(queries.rows)) as bar:
        return rank_queries(program, theta, queries, on_progress=bar.advance)


def _load(bundle: Path) -> DeviceProgram:
    return _load_opened(Bundle.open(bundle))


def _load_opened(bundle: Bundle) -> DeviceProgram:
    """Loads the program and says so: importing and loading take seconds."""
    with progress("Loading the runtime and the program", total=1) as bar:
        from carpool_device.runtime import DeviceProgram  # noqa: PLC0415

        program = DeviceProgram.load(bundle)
        bar.advance()
    return program


def _named_files(pairs: list[str], *, taken: tuple[str, ...]) -> dict[str, Path]:
    """Splits ``NAME=FILE`` pairs.

    Raises:
        ConfigError: no ``=``, or a name that is empty or given twice.
    """
    files: dict[str, Path] = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not (separator and name and file):
            raise ConfigError(f"--theta: expected NAME=FILE, got {pair!r}.")
        if name in files or name in taken:
            raise ConfigError(f"--theta: expected distinct names, got {name!r} again.")
        files[name] = Path(file)
    return files


def _one_line(text: str, *, longest: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
