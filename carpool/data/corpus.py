"""Documents and examples as JSON lines: every line is checked, a bad one is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ValidationError

from carpool.errors import CorpusError
from carpool.files import write_atomically
from carpool.schema import Model, describe, without_twins


def _refuse_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"expected text that is not blank, got {text!r}")
    return text


NonBlank = Annotated[str, AfterValidator(_refuse_blank)]
"""Text with at least one character that is not white space."""

_Record = TypeVar("_Record", bound=Model)


class Document(Model):
    """A public document: what queries are answered with."""

    id: NonBlank
    title: NonBlank
    text: str

    @property
    def passage(self) -> str:
        """What is embedded: ``"title. text"``, or the title alone where there is no text."""
        return f"{self.title}. {self.text}" if self.text else self.title


class Example(Model):
    """A private query of one client and the id of the document that answered it."""

    client: NonBlank
    query: NonBlank
    document: NonBlank


def read_notice(path: Path) -> str:
    """A text that must go with documents.

    Raises:
        CorpusError: it is no text file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"notice {path}: expected a text file, got: {error}") from error


def read_documents(path: Path) -> list[Document]:
    """Reads a ``documents.jsonl``.

    Raises:
        CorpusError: no file, no line, a malformed line, or an id that stands twice; names
            file, line number and reason.
    """
    documents: list[Document] = []
    seen: dict[str, int] = {}
    for number, document in _read_lines(path, Document):
        first = seen.setdefault(document.id, number)
        if first != number:
            raise CorpusError(
                f"{path}:{number}: document id {document.id!r} stands at line {first} already; "
                "expected distinct ids."
            )
        documents.append(document)
    if not documents:
        raise CorpusError(f"{path}: expected at least one document, found none.")
    return documents


def read_examples(path: Path, *, document_ids: Iterable[str]) -> list[Example]:
    """Reads an ``examples.jsonl`` whose documents must all be known.

    Args:
        path: the file.
        document_ids: the ids that an example may name.

    Raises:
        CorpusError: no file, no line, a malformed line or an unknown document; names file,
            line number and reason.
    """
    known = set(document_ids)
    examples = []
    for number, example in _read_lines(path, Example):
        if example.document not in known:
            raise CorpusError(
                f"{path}:{number}: unknown document {example.document!r}; expected one of the "
                f"{len(known)} ids in the documents file."
            )
        examples.append(example)
    if not examples:
        raise CorpusError(f"{path}: expected at least one example, found none.")
    return examples


def write_lines(path: Path, records: Iterable[Model]) -> None:
    """Writes records as JSON lines (UTF-8, fields in their schema's order), atomically."""
    lines = (json.dumps(r.model_dump(mode="json"), ensure_ascii=False) for r in records)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def _read_lines(path: Path, record: type[_Record]) -> Iterator[tuple[int, _Record]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    parsed = record.model_validate_json(line.decode())
                    json.loads(line, object_pairs_hook=without_twins)
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{path}:{number}: expected UTF-8, got byte 0x{line[error.start]:02x} as "
                        f"the line's byte {error.start + 1}."
                    ) from error
                except ValidationError as error:
                    reason = describe(error, record).replace("\n", "; ")
                    reason = reason.replace(" at line 1 column ", " at column ")
                    raise CorpusError(f"{path}:{number}: {reason}") from error
                except ValueError as error:
                    raise CorpusError(f"{path}:{number}: expected JSON, got {error}.") from error
                yield number, parsed
    except OSError as error:
        raise CorpusError(f"{path}: expected a JSON-lines file, got: {error.strerror}.") from error
