"""The program that only searches, and the golden step as ExecuTorch's own bundled program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from export_cases import MODEL, Case
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from carpool.bundle import Bundle
from carpool.errors import BundleError, ParityError
from carpool.theta import write_theta
from carpool_export.corpus import encode_rows, load_tokenizer
from carpool_export.parity import random_theta, relative_error
from carpool_export.reference import padded_batch
from carpool_export.ways_out import inference
from carpool_export.ways_out.bundled_program import write_bundled_program
from carpool_export.ways_out.inference import freeze
from carpool_export.ways_out.merge import merge


@pytest.fixture
def trained(small: Case, tmp_path: Path) -> Path:
    """A theta of the small bundle that is far from zero."""
    return write_random_theta(small.bundle, tmp_path / "theta.safetensors")


def write_random_theta(bundle: Bundle, path: Path) -> Path:
    layout = bundle.manifest.layout
    theta = random_theta(layout.num_values, seed=3).numpy()
    write_theta(path, theta, layout=layout, bundle_id=bundle.id, round_number=1)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_frozen_program_scores_as_the_merged_model_does(
    preset: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The merged model is run by the sentence-transformers library; rows are padded."""
    bundle = request.getfixturevalue(preset).bundle
    theta = write_random_theta(bundle, tmp_path / "theta.safetensors")
    freeze(bundle.path, theta, tmp_path / "search.pte", model=MODEL)
    merge(bundle.path, theta, tmp_path / "merged", model=MODEL)
    texts = [document.passage for document in bundle.documents()[:5]] + ["short"]
    rows = encode_rows(load_tokenizer(bundle.tokenizer_path, max_length=64), texts)
    batch = padded_batch(rows, labels=[0] * 6, weights=[1.0] * 6)
    assert int(batch.attention_mask.sum()) < batch.attention_mask.numel()  # there is padding
    program = Runtime.get().load_program(tmp_path / "search.pte")
    assert program.method_names == {"forward", "embed"}
    inputs = (batch.input_ids, batch.attention_mask)
    forward = program.load_method("forward")
    assert forward is not None
    scores = forward.execute(inputs)[0].clone()
    library = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    vectors = load_file(tmp_path / "merged" / "documents.safetensors")["vectors"]
    expected = library.similarity(library.encode(texts, convert_to_tensor=True), vectors)
    assert relative_error(scores, expected) <= 1e-5
    alone = forward.execute((batch.input_ids[5:, :4], batch.attention_mask[5:, :4]))[0].clone()
    assert relative_error(alone, scores[5:]) <= 1e-5


@pytest.mark.slow
def test_a_frozen_program_that_is_wrong_is_not_written(
    small: Case, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that counts as text."""
    wrong = property(inference.Packing.membership_BN.func)
    monkeypatch.setattr(inference._PaddedPacking, "membership_BN", wrong)
    with pytest.raises(ParityError, match=r"^scores at batch \d, length \d+: expected an error"):
        freeze(small.bundle.path, trained, tmp_path / "search.pte", model=MODEL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theta.safetensors"]


def test_nothing_is_overwritten(small: Case, trained: Path, tmp_path: Path) -> None:
    """By either."""
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    with pytest.raises(BundleError, match="taken: expected a path where nothing is yet"):
        freeze(small.bundle.path, trained, taken, model=MODEL)
    with pytest.raises(BundleError, match="taken: expected a path where nothing is yet"):
        write_bundled_program(small.bundle.path, taken)
    assert taken.read_bytes() == b"mine"


def test_executorch_itself_replays_the_bundled_golden_step(small: Case, tmp_path: Path) -> None:
    """Each method, by ExecuTorch's own verification; with tighter bounds it complains."""
    path = tmp_path / "golden.bpte"
    write_bundled_program(small.bundle.path, path)
    bundled = portable_lib._load_bundled_program_from_buffer(path.read_bytes())
    for method in ("gradients", "scores", "embed"):
        bundled.verify_result_with_bundled_expected_output(method, 0, 1e-4, 1e-4)
        with pytest.raises(RuntimeError, match="verification failed"):
            bundled.verify_result_with_bundled_expected_output(method, 0, 0.0, 1e-9)


def test_the_bundled_step_is_the_golden_step(small: Case, tmp_path: Path) -> None:
    """Byte for byte: the expected gradient and the program are inside."""
    path = tmp_path / "golden.bpte"
    write_bundled_program(small.bundle.path, path)
    data = path.read_bytes()
    arrays, _ = small.bundle.golden()
    for name in ("expected_gradient", "expected_scores", "expected_embed", "theta"):
        assert torch.from_numpy(arrays[name]).contiguous().numpy().tobytes() in data
    assert small.bundle.program_path.read_bytes() in data
