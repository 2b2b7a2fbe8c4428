"""A small data set for the tiny bundle: 24 clients, one of whom no program can train."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from carpool.data.corpus import Document, Example
from carpool.data.dataset import split_clients, write_dataset

UNKNOWN = Document(id="d-unknown", title="not in the bundle", text="")
BROKEN = "client-broken"


def write_tiny_data(folder: Path, *, documents: Sequence[Document], words: Sequence[str]) -> Path:
    """Clients of one to nine examples; the broken one's document is not in the bundle."""
    choice = random.Random(0)  # noqa: S311  test data
    examples = [
        Example(
            client=f"client-{client:02d}",
            query=" ".join(choice.choices(words, k=choice.randint(1, 5))),
            document=choice.choice(documents).id,
        )
        for client in range(23)
        for _ in range(choice.randint(1, 9))
    ]
    examples.append(Example(client=BROKEN, query="red", document=UNKNOWN.id))
    # a seed with which the broken client is one of those that train
    for seed in range(100):
        split = split_clients({e.client for e in examples}, seed=seed)
        if BROKEN in split.train:
            write_dataset(folder, documents=[*documents, UNKNOWN], examples=examples, split=split)
            return folder
    raise AssertionError("no seed found")
