"""A data set's folder and ``carpool data``: split by client, read back, shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import carpool.cli
from carpool.data.corpus import Document, Example
from carpool.data.dataset import Dataset, Split, split_clients, write_dataset
from carpool.data.folder import write_folder
from carpool.errors import CorpusError

DOCUMENTS = [Document(id="d", title="Title", text="")]


def examples(clients: int, each: int = 2) -> list[Example]:
    return [
        Example(client=f"c{c}", query=f"query {c} {i}", document="d")
        for c in range(clients)
        for i in range(each)
    ]


@settings(deadline=None)
@given(
    st.sets(st.text(min_size=1, max_size=5), min_size=3, max_size=40),
    st.integers(0, 2**40),
    st.floats(0.01, 0.49),
)
def test_every_client_is_in_one_part(clients: set[str], seed: int, held_out: float) -> None:
    """Disjoint and complete; at least one client each in validation and test."""
    split = split_clients(clients, seed=seed, held_out=held_out)
    parts = [*split.train, *split.validation, *split.test]
    assert sorted(parts) == sorted(clients)
    assert len(split.validation) == len(split.test) == max(1, round(held_out * len(clients)))
    assert split == split_clients(sorted(clients, reverse=True), seed=seed, held_out=held_out)


def test_the_default_split_never_changes() -> None:
    """A literal: results on validation clients must stay comparable over versions."""
    split = split_clients([f"c{i}" for i in range(20)], seed=0)
    assert (split.validation, split.test) == (("c16", "c18"), ("c10", "c9"))


def test_a_split_needs_three_clients_and_a_sensible_share() -> None:
    """Whole messages."""
    with pytest.raises(CorpusError) as caught:
        split_clients(["a", "b", "a"], seed=0)
    assert str(caught.value) == "expected at least 3 clients to split, got 2."
    for share in (0.0, 0.5, -1.0):
        with pytest.raises(CorpusError) as caught:
            split_clients(["a", "b", "c"], seed=0, held_out=share)
        assert str(caught.value) == f"expected held_out between 0 and 0.5, got {share}."


def test_a_data_set_is_read_back(tmp_path: Path) -> None:
    """By client, in file order."""
    split = split_clients([f"c{i}" for i in range(5)], seed=3)
    write_dataset(tmp_path / "set", documents=DOCUMENTS, examples=examples(5), split=split)
    found = Dataset.open(tmp_path / "set")
    assert found.documents == DOCUMENTS
    assert found.split == split
    assert [e for own in found.examples.values() for e in own] == examples(5)
    assert set(found.part("test")) == set(split.test)


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        ({"train": ["c0", "c1"]}, "1 differ, for example 'c2'"),
        ({"train": ["c0", "c1", "c2", "x"]}, "1 differ, for example 'x'"),
        ({"train": ["c0", "c1", "c2", "c3"]}, "1 differ, for example 'a client in two parts'"),
    ],
)
def test_a_split_of_other_clients_is_refused(
    tmp_path: Path, change: dict[str, list[str]], odd: str
) -> None:
    """A client that is left out, unknown, or on two sides."""
    split = Split(seed=0, train=("c0", "c1", "c2"), validation=("c3",), test=("c4",))
    write_dataset(tmp_path, documents=DOCUMENTS, examples=examples(5), split=split)
    path = tmp_path / "split.json"
    path.write_text(json.dumps(split.model_dump() | change))
    with pytest.raises(CorpusError) as caught:
        Dataset.open(tmp_path)
    assert str(caught.value) == (
        f"{path}: expected each of the 5 clients of examples.jsonl once; {odd}."
    )


def test_a_missing_or_broken_split_is_refused(tmp_path: Path) -> None:
    """And what is no folder at all."""
    write_folder(
        tmp_path,
        source="s",
        documents=DOCUMENTS,
        examples=examples(5),
        seed=0,
        counts={},
        notice=None,
    )
    path = tmp_path / "split.json"
    path.write_text('{"seed": 0}')
    with pytest.raises(CorpusError) as caught:
        Dataset.open(tmp_path)
    assert str(caught.value) == f"{path}: train: missing\nvalidation: missing\ntest: missing"
    path.unlink()
    with pytest.raises(CorpusError) as caught:
        Dataset.open(tmp_path)
    assert str(caught.value) == (
        f"{path}: expected the split by client, got: No such file or directory. "
        "Make the folder with `carpool data attack` or `carpool data import`."
    )


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``carpool`` in this process; returns exit code, standard output and error."""
    monkeypatch.setenv("COLUMNS", "120")

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["carpool", *map(str, arguments)])
        code: object = 0
        try:
            carpool.cli.main()
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return code, out, err

    return run_main


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """A corpus of 10 clients as two files."""
    documents, queries = tmp_path / "docs.jsonl", tmp_path / "queries.jsonl"
    documents.write_text('{"id": "d", "title": "Title [b]", "text": "Straße"}\n', "utf-8")
    lines = [json.dumps(e.model_dump()) + "\n" for e in examples(10)]
    queries.write_text("".join(lines), "utf-8")
    return documents, queries


def test_import_splits_and_keeps_everything(
    tmp_path: Path, run: Run, corpus: tuple[Path, Path]
) -> None:
    """What comes in is what the folder holds; the counts are printed."""
    out = tmp_path / "set"
    code, stdout, stderr = run(
        "data", "import", out, "--documents", corpus[0], "--examples", corpus[1], "--seed", 5
    )
    assert (code, stderr) == (0, "")
    assert "docs.jsonl and queries.jsonl" in stdout
    found = Dataset.open(out)
    assert found.split == split_clients([f"c{i}" for i in range(10)], seed=5)
    assert [e for own in found.examples.values() for e in own] == examples(10)
    assert json.loads((out / "summary.json").read_text("utf-8")) == {
        "source": "docs.jsonl and queries.jsonl",
        "seed": 5,
        "counts": {"documents": 1, "clients": 10, "examples": 20},
        "parts": {
            "train": {"clients": 8, "examples": 16},
            "validation": {"clients": 1, "examples": 2},
            "test": {"clients": 1, "examples": 2},
        },
        "shared_texts": 0,
    }


def test_import_leaves_no_notice_of_an_earlier_set(
    tmp_path: Path, run: Run, corpus: tuple[Path, Path]
) -> None:
    """It would become the licence of other documents."""
    out = tmp_path / "set"
    out.mkdir()
    (out / "NOTICE").write_text("of another set")
    code, _, _ = run("data", "import", out, "--documents", corpus[0], "--examples", corpus[1])
    assert code == 0
    assert not (out / "NOTICE").exists()


def test_import_into_a_file_is_refused(tmp_path: Path, run: Run, corpus: tuple[Path, Path]) -> None:
    """In one line."""
    out = tmp_path / "file"
    out.write_bytes(b"")
    code, _, stderr = run("data", "import", out, "--documents", corpus[0], "--examples", corpus[1])
    assert code == 2
    assert f"{out}: expected a folder, or a place where one can be made, got: " in stderr


def test_import_counts_texts_of_more_than_one_client(
    tmp_path: Path, run: Run, corpus: tuple[Path, Path]
) -> None:
    """They are kept and named: they may stand on both sides of the split."""
    line = '{"client": "c9", "query": "query 0 0", "document": "d"}\n'
    corpus[1].write_text(corpus[1].read_text("utf-8") + line, "utf-8")
    out = tmp_path / "set"
    code, stdout, _ = run("data", "import", out, "--documents", corpus[0], "--examples", corpus[1])
    assert code == 0
    assert "queries that stand in more than one client" in stdout
    assert json.loads((out / "summary.json").read_text("utf-8"))["shared_texts"] == 1


def test_import_refuses_a_malformed_line_and_writes_nothing(
    tmp_path: Path, run: Run, corpus: tuple[Path, Path]
) -> None:
    """Exit code 2, file, line and reason."""
    corpus[1].write_text('{"client": "a", "query": "q", "document": "zz"}\n', "utf-8")
    out = tmp_path / "set"
    assert run("data", "import", out, "--documents", corpus[0], "--examples", corpus[1]) == (
        2,
        "",
        (
            f"Error: {corpus[1]}:1: unknown document 'zz'; expected one of the 1 ids in the "
            "documents file.\n"
        ),
    )
    assert not out.exists()


def test_show_prints_counts_and_training_examples_alone(
    tmp_path: Path, run: Run, corpus: tuple[Path, Path]
) -> None:
    """Held-out queries stay unseen; brackets in a title are text."""
    out = tmp_path / "set"
    run("data", "import", out, "--documents", corpus[0], "--examples", corpus[1])
    code, stdout, stderr = run("data", "show", out, "--count", 100)
    assert (code, stderr) == (0, "")
    found = Dataset.open(out)
    shown = {e.query for own in found.examples.values() for e in own if e.query in stdout}
    assert shown == {e.query for own in found.part("train").values() for e in own}
    assert "Title [b]" in stdout
    assert run("data", "show", out, "--count", 0)[0] == 0
