"""A data set on disk: documents, examples, and a split by client that is fixed once."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from carpool.data.corpus import Document, Example, read_documents, read_examples, write_lines
from carpool.errors import CorpusError
from carpool.files import make_folder, write_atomically
from carpool.randomness import shuffled, words
from carpool.schema import Model, describe

SplitName = Literal["train", "validation", "test"]

DOCUMENTS_NAME = "documents.jsonl"
EXAMPLES_NAME = "examples.jsonl"
SPLIT_NAME = "split.json"


class Split(Model):
    """Which clients are for what; every client is in one part.

    Attributes:
        seed: what the split was drawn with.
        train, validation, test: client names, sorted.
    """

    seed: Annotated[int, Field(ge=0)]
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def split_clients(clients: Iterable[str], *, seed: int, held_out: float = 0.1) -> Split:
    """Splits clients at random: ``held_out`` of them for validation, as many for test.

    Args:
        clients: names; duplicates count once.
        seed: equal seeds and names give equal splits, on every machine.
        held_out: share of each held-out part, in (0, 0.5); at least one client each.

    Raises:
        CorpusError: fewer than three clients, or ``held_out`` out of range.
    """
    names = sorted(set(clients))
    if len(names) < 3:  # noqa: PLR2004  one for each part
        raise CorpusError(f"expected at least 3 clients to split, got {len(names)}.")
    if not 0 < held_out < 0.5:  # noqa: PLR2004  two parts of this size must leave some
        raise CorpusError(f"expected held_out between 0 and 0.5, got {held_out}.")
    stream = words(purpose="carpool/1/split", key=str(seed).encode(), device_id="", round_number=0)
    order = [names[i] for i in shuffled(len(names), stream)]
    size = max(1, round(held_out * len(names)))
    return Split(
        seed=seed,
        validation=tuple(sorted(order[:size])),
        test=tuple(sorted(order[size : 2 * size])),
        train=tuple(sorted(order[2 * size :])),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Documents and the examples of every client, with the split.

    Attributes:
        documents: in the order of the scores.
        examples: by client, in file order.
        split: which clients are for what.
    """

    documents: list[Document]
    examples: dict[str, list[Example]]
    split: Split

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Reads a folder written by ``write_dataset``.

        Raises:
            CorpusError: a file is missing or malformed, or the split and the examples name
                different clients.
        """
        documents = read_documents(folder / DOCUMENTS_NAME)
        examples = read_examples(folder / EXAMPLES_NAME, document_ids=(d.id for d in documents))
        path = folder / SPLIT_NAME
        try:
            split = Split.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CorpusError(
                f"{path}: expected the split by client, got: {error.strerror}. "
                "Make the folder with `carpool data attack` or `carpool data import`."
            ) from error
        except ValidationError as error:
            raise CorpusError(f"{path}: {describe(error, Split)}") from error
        by_client = group_by_client(examples)
        parts = [*split.train, *split.validation, *split.test]
        if sorted(parts) != sorted(by_client):
            odd = set(parts).symmetric_difference(by_client) or {"a client in two parts"}
            raise CorpusError(
                f"{path}: expected each of the {len(by_client)} clients of {EXAMPLES_NAME} once; "
                f"{len(odd)} differ, for example {min(odd)!r}."
            )
        return cls(documents=documents, examples=by_client, split=split)

    def part(self, name: SplitName) -> dict[str, list[Example]]:
        """The examples of one part's clients, by client."""
        return {client: self.examples[client] for client in getattr(self.split, name)}


def group_by_client(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples by client, in order of first appearance."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.client].append(example)
    return dict(groups)


def write_dataset(
    folder: Path, *, documents: list[Document], examples: list[Example], split: Split
) -> None:
    """Writes the three files of a data set; ``Dataset.open`` reads them back."""
    make_folder(folder)
    write_lines(folder / DOCUMENTS_NAME, documents)
    write_lines(folder / EXAMPLES_NAME, examples)
    text = json.dumps(split.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomically(folder / SPLIT_NAME, f"{text}\n".encode())
