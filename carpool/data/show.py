"""Tables about data sets, for people."""

from __future__ import annotations

import statistics
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from carpool.data.dataset import Dataset, SplitName
from carpool.data.folder import Summary


def print_summary(summary: Summary) -> None:
    """Prints what was kept and dropped, and the split, on standard output."""
    console = Console()
    table = Table("what", "how many", title=Text(summary.source))
    table.columns[1].justify = "right"
    for name, value in summary.counts.items():
        table.add_row(Text(name), f"{value:,}")
    table.add_section()
    for name, part in summary.parts.items():
        table.add_row(f"{name}: clients", f"{part.clients:,}")
        table.add_row(f"{name}: examples", f"{part.examples:,}")
    if summary.shared_texts:
        table.add_section()
        table.add_row("queries that stand in more than one client", f"{summary.shared_texts:,}")
    table.caption = f"split by client, seed {summary.seed}"
    console.print(table)


def print_dataset(dataset: Dataset, *, count: int) -> None:
    """Prints sizes by part, and ``count`` examples spread over the training clients."""
    console = Console()
    table = Table("part", "clients", "examples", "per client: least", "median", "most")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in get_args(SplitName):
        sizes = [len(examples) for examples in dataset.part(name).values()]
        table.add_row(
            name,
            f"{len(sizes):,}",
            f"{sum(sizes):,}",
            f"{min(sizes, default=0):,}",
            f"{statistics.median(sizes) if sizes else 0:g}",
            f"{max(sizes, default=0):,}",
        )
    console.print(f"{len(dataset.documents):,} documents")
    console.print(table)

    titles = {document.id: document.title for document in dataset.documents}
    train = [e for examples in dataset.part("train").values() for e in examples]
    for example in train[:: max(1, len(train) // max(1, count))][:count]:
        console.print(
            Text(f"{example.client}: {example.query}\n  -> {example.document} "),
            Text(titles[example.document]),
            sep="",
        )
