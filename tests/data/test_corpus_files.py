"""JSON lines: every malformed line is refused with file, line number and reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.data.corpus import Document, Example, read_documents, read_examples, write_lines
from carpool.errors import CorpusError

GOOD = b'{"client": "a", "query": "q", "document": "d"}\n'
DOCUMENT = b'{"id": "d", "title": "t", "text": "x"}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def refused_examples(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        read_examples(path, document_ids=["d", "e"])
    return str(caught.value)


def refused_documents(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        read_documents(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"no json", "value: Invalid JSON: expected ident at column 2, got 'no json\\n'"),
        (b'{"client": "a"}', "query: missing; document: missing"),
        (
            b'{"client": "a", "query": "q", "document": "d", "documnt": 1}',
            "documnt: unknown field; did you mean 'document'?",
        ),
        (
            b'{"client": 7, "query": "q", "document": "d"}',
            "client: Input should be a valid string, got 7",
        ),
        (
            b'{"client": "a", "query": null, "document": "d"}',
            "query: Input should be a valid string, got None",
        ),
        (
            b'{"client": "a", "query": " \\t", "document": "d"}',
            "query: expected text that is not blank, got ' \\t'",
        ),
        (
            b'{"client": "", "query": "q", "document": "d"}',
            "client: expected text that is not blank, got ''",
        ),
        (
            b'{"client": "a", "query": "q", "document": "x"}',
            "unknown document 'x'; expected one of the 2 ids in the documents file.",
        ),
        (
            b'{"client": "a", "query": "\xff", "document": "d"}',
            "expected UTF-8, got byte 0xff as the line's byte 27.",
        ),
        (
            b'{"client": "a", "query": "q", "query": "r", "document": "d"}',
            "expected JSON, got the key 'query' twice in one object.",
        ),
        (b"[]", "value: Input should be an object, got []"),
        (b'"text"', "value: Input should be an object, got 'text'"),
    ],
)
def test_a_malformed_example_is_refused(path: Path, line: bytes, reason: str) -> None:
    """The whole message; the line number counts blank lines and starts at 1."""
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    assert refused_examples(path) == f"{path}:3: {reason}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "e", "title": "t"}', "text: missing"),
        (
            b'{"id": "e", "title": " ", "text": ""}',
            "title: expected text that is not blank, got ' '",
        ),
        (
            b'{"id": 5, "title": "t", "text": "x"}',
            "id: Input should be a valid string, got 5",
        ),
        (
            b'{"id": "d", "title": "u", "text": "y"}',
            "document id 'd' stands at line 1 already; expected distinct ids.",
        ),
    ],
)
def test_a_malformed_document_is_refused(path: Path, line: bytes, reason: str) -> None:
    """A text may be empty, an id or title not; an id stands once."""
    path.write_bytes(DOCUMENT + line)
    assert refused_documents(path) == f"{path}:2: {reason}"


def test_a_bad_line_does_not_flood_the_message(path: Path) -> None:
    """A wrong value may be a whole file on one line, and private."""
    path.write_bytes(b'{"client": "' + b"x" * 100_000)
    assert len(refused_examples(path)) < 400


def test_a_half_surrogate_is_refused(path: Path) -> None:
    """It is JSON, but no text that could be written as UTF-8."""
    path.write_bytes(b'{"client": "a", "query": "\\ud800", "document": "d"}')
    assert refused_examples(path).startswith(f"{path}:1: value: Invalid JSON: ")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(path: Path, content: bytes) -> None:
    """Also one of blank lines."""
    path.write_bytes(content)
    assert refused_examples(path) == f"{path}: expected at least one example, found none."
    assert refused_documents(path) == f"{path}: expected at least one document, found none."


def test_a_missing_file_and_a_directory_are_refused(path: Path) -> None:
    """With the system's reason."""
    missing = f"{path}: expected a JSON-lines file, got: No such file or directory."
    assert refused_examples(path) == missing
    assert refused_documents(path) == missing
    path.mkdir()
    assert refused_examples(path) == f"{path}: expected a JSON-lines file, got: Is a directory."
    assert refused_documents(path) == f"{path}: expected a JSON-lines file, got: Is a directory."


text = st.text(st.characters(codec="utf-8"), max_size=20)
non_blank = text.filter(lambda t: any(not c.isspace() for c in t))


@settings(deadline=None)
@given(st.lists(st.builds(Document, id=non_blank, title=non_blank, text=text), min_size=1))
def test_documents_survive_their_file(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document]
) -> None:
    """Any text: line separators, quotes, control characters, every script."""
    unique = list({document.id: document for document in documents}.values())
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    write_lines(path, unique)
    assert read_documents(path) == unique


def test_long_and_foreign_queries_survive(path: Path) -> None:
    """10,000 characters, emoji, right-to-left text, a line separator inside."""
    queries = ["x" * 10_000, "🚗 مرحبا 你好", "a\u2028b\nc", "\u0000"]
    examples = [Example(client="ä", query=query, document="d") for query in queries]
    write_lines(path, examples)
    assert read_examples(path, document_ids=["d"]) == examples


def test_windows_line_ends_are_white_space(path: Path) -> None:
    """JSON allows it."""
    path.write_bytes(GOOD.replace(b"\n", b"\r\n"))
    assert len(read_examples(path, document_ids=["d"])) == 1


def test_a_passage_is_title_and_text() -> None:
    """What is embedded; a document without text is its title."""
    assert Document(id="d", title="T", text="x.").passage == "T. x."
    assert Document(id="d", title="T", text="").passage == "T"
