"""The merged model, opened by the sentence-transformers library, scores as the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from export_cases import MODEL, Case, golden_batch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from carpool.bundle import Bundle
from carpool.errors import BundleError, ExportError
from carpool.theta import write_theta, zero_theta
from carpool_export.parity import random_theta, relative_error
from carpool_export.ways_out.merge import merge


@pytest.mark.parametrize(
    "preset", [pytest.param("small"), pytest.param("paper", marks=pytest.mark.slow)]
)
def test_merged_models_scores_are_the_programs(
    preset: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Adapter, head and biases all fold: the dot product is the score, to 1e-5 of the largest.

    The bound is above that of the program's own scores because the merged table and vectors
    are rounded to float32 once more.
    """
    case: Case = request.getfixturevalue(preset)
    manifest = case.bundle.manifest
    theta = random_theta(case.num_values, seed=3)
    write_theta(
        tmp_path / "theta.safetensors",
        theta.numpy(),
        layout=manifest.layout,
        bundle_id=case.bundle.id,
        round_number=1,
    )
    merge(case.bundle.path, tmp_path / "theta.safetensors", tmp_path / "merged", model=MODEL)
    library = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    vectors = load_file(tmp_path / "merged" / "documents.safetensors")["vectors"]
    _, texts = case.bundle.golden()
    queries = library.encode(texts, convert_to_tensor=True)
    scores = case.scores(theta, golden_batch(case.bundle))
    assert relative_error(library.similarity(queries, vectors), scores) <= 1e-5
    assert library.max_seq_length == manifest.tokenizer.max_length
    assert (tmp_path / "merged" / "documents.jsonl").read_bytes() == (
        case.bundle.path / "documents.jsonl"
    ).read_bytes()
    assert "MITRE" in (tmp_path / "merged" / "README.md").read_text()


@pytest.fixture
def released(small_bundle: Path, tmp_path: Path) -> Path:
    """A theta of ``small_bundle``."""
    bundle = Bundle.open(small_bundle)
    layout = bundle.manifest.layout
    path = tmp_path / "theta.safetensors"
    write_theta(path, zero_theta(layout), layout=layout, bundle_id=bundle.id, round_number=1)
    return path


def test_another_model_is_refused(
    small_bundle: Path, released: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Folding an adapter into other weights would give a model nobody trained."""
    with pytest.raises(
        ExportError,
        match=f"^{re.escape(str(tiny_model))}: expected the model that the bundle was exported "
        r"from \(all-MiniLM-L6-v2, weights [0-9a-f]{12}\), got Tiny, weights [0-9a-f]{12}\. "
        r"Pass the right one with --model\.$",
    ):
        merge(small_bundle, released, tmp_path / "merged", model=str(tiny_model))
    assert not (tmp_path / "merged").exists()


def test_existing_destination_is_left_alone(
    small_bundle: Path, released: Path, tmp_path: Path
) -> None:
    """Nothing is overwritten."""
    with pytest.raises(BundleError, match="expected a path where nothing is yet"):
        merge(small_bundle, released, tmp_path, model=MODEL)
