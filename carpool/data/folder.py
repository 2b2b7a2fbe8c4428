"""A data set's folder as ``carpool data`` leaves it: the set, its counts and its notice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from carpool.data.corpus import Document, Example
from carpool.data.dataset import SplitName, group_by_client, split_clients, write_dataset
from carpool.files import make_folder, write_atomically
from carpool.schema import Model

SUMMARY_NAME = "summary.json"
NOTICE_NAME = "NOTICE"
DEFAULT_SEED = 0
"""Of the split; fixed, so that everybody's validation clients are the same."""

Count = Annotated[int, Field(ge=0)]


class PartSummary(Model):
    """How large one part of the split is."""

    clients: Count
    examples: Count


class Summary(Model):
    """What went in, what was kept and dropped, and how it was split.

    Attributes:
        source: where the text comes from.
        seed: of the split.
        counts: named counts in the order in which they arose.
        parts: by part of the split.
        shared_texts: queries that stand in more than one client; where those clients are on
            both sides of the split, a held-out query was trained on.
    """

    source: str
    seed: Count
    counts: dict[str, Count]
    parts: dict[SplitName, PartSummary]
    shared_texts: Count


def write_folder(
    folder: Path,
    *,
    source: str,
    documents: list[Document],
    examples: list[Example],
    seed: int,
    counts: Mapping[str, int],
    notice: str | None,
) -> Summary:
    """Splits by client and writes documents, examples, split, summary and notice.

    Guarantees: equal arguments give equal bytes. Each file is replaced atomically; the summary
    is the last.

    Args:
        folder: is made where it is not there; files of an earlier set in it are replaced.
        source: where the text comes from.
        documents: in the order of the scores.
        examples: in the order in which they are to stand.
        seed: of the split.
        counts: for the summary.
        notice: what must accompany a copy of the text, or None.

    Raises:
        CorpusError: fewer than three clients.
    """
    by_client = group_by_client(examples)
    split = split_clients(by_client, seed=seed)
    parts: dict[SplitName, tuple[str, ...]] = {
        "train": split.train,
        "validation": split.validation,
        "test": split.test,
    }
    holders: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        holders[example.query].add(example.client)
    summary = Summary(
        source=source,
        seed=seed,
        counts=dict(counts),
        parts={
            name: PartSummary(clients=len(part), examples=sum(len(by_client[c]) for c in part))
            for name, part in parts.items()
        },
        shared_texts=sum(len(clients) > 1 for clients in holders.values()),
    )
    make_folder(folder)
    # an earlier set's: without its summary a folder is no data set
    (folder / SUMMARY_NAME).unlink(missing_ok=True)
    (folder / NOTICE_NAME).unlink(missing_ok=True)
    write_dataset(folder, documents=documents, examples=examples, split=split)
    if notice is not None:
        write_atomically(folder / NOTICE_NAME, notice.encode())
    text = json.dumps(summary.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(folder / SUMMARY_NAME, f"{text}\n".encode())
    return summary
