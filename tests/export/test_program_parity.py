"""The finished program against eager PyTorch in float64, at the bars of the project.

In float64, because eager float32 is itself off by up to half of the bar.
"""

from __future__ import annotations

import json

import pytest
import torch
from export_cases import MODEL, Case, golden_batch, step_inputs
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from carpool.recipe import PLAIN_GRADIENT_CLIP
from carpool_export.parity import random_batch, random_theta, relative_error
from carpool_export.reference import Batch, clipped_sum
from carpool_export.source import open_source

SHAPES = [(1, 2), (1, 64), (3, 17), (5, 33), (8, 32), (8, 64)]
BAR = 2e-6


def make_batch(case: Case, batch: int, length: int, *, seed: int = 7) -> Batch:
    return random_batch(
        batch=batch,
        length=length,
        vocabulary=30522,
        num_documents=case.bundle.manifest.documents.count,
        seed=seed,
    )


@pytest.fixture(
    params=[pytest.param("small"), pytest.param("paper", marks=pytest.mark.slow)], scope="session"
)
def case(request: pytest.FixtureRequest) -> Case:
    opened: Case = request.getfixturevalue(request.param)
    return opened


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_gradient_equals_eager(case: Case, shape: tuple[int, int]) -> None:
    """With a bound too large to clip, the program gives the plain weighted gradient and loss."""
    batch, theta = make_batch(case, *shape), random_theta(case.num_values, seed=11)
    expected_loss, expected = case.reference.plain_gradients(theta, batch)
    loss, gradient = case.step(theta, batch, PLAIN_GRADIENT_CLIP)
    assert relative_error(gradient, expected) <= BAR
    assert relative_error(loss, expected_loss, at_least=1.0) <= BAR


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clipped_gradient_equals_eager(case: Case, shape: tuple[int, int]) -> None:
    """With a bound inside the range of norms, each example is clipped jointly over theta."""
    batch, theta = make_batch(case, *shape), random_theta(case.num_values, seed=12)
    _, examples = case.reference.example_gradients(theta, batch)
    norms = examples[batch.example_weights != 0].norm(dim=1)
    bound = 0.9 * float(norms.median())
    expected = clipped_sum(examples, batch.example_weights, l2_clip_norm=bound)
    _, gradient = case.step(theta, batch, bound)
    assert float(norms.max()) > bound
    assert relative_error(gradient, expected) <= BAR


def test_padding_row_adds_exactly_nothing(case: Case) -> None:
    """The same bits come out whatever a row of weight 0 holds, an empty mask included."""
    batch, theta = make_batch(case, 5, 12), random_theta(case.num_values, seed=13)
    batch.example_weights[3] = 0.0
    loss, gradient = case.step(theta, batch, 0.7)
    batch.input_ids[3], batch.labels[3] = 0, 5
    batch.attention_mask[3] = 0
    other_loss, other_gradient = case.step(theta, batch, 0.7)
    assert torch.equal(gradient, other_gradient)
    assert torch.equal(loss, other_loss)
    assert float(gradient.abs().max()) > 0


def test_twenty_local_steps_stay_with_eager(case: Case) -> None:
    """Errors do not build up: 20 SGD steps end within 1e-5 of theta's largest value."""
    theta = torch.zeros(case.num_values)
    expected = theta.double()
    for step in range(20):
        batch = make_batch(case, 4, 16, seed=step)
        _, gradient = case.step(theta, batch, PLAIN_GRADIENT_CLIP)
        theta = theta - 0.1 * gradient
        _, eager = case.reference.plain_gradients(expected, batch)
        expected = expected - 0.1 * eager
    assert relative_error(theta, expected) <= 1e-5
    assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_equal_eager(case: Case, shape: tuple[int, int]) -> None:
    """Scores at a trained theta, to 5e-6 of the largest."""
    batch, theta = make_batch(case, *shape), random_theta(case.num_values, seed=14)
    scores = case.scores(theta, batch)
    with torch.no_grad():
        expected = case.reference.scores(theta, batch)
    assert relative_error(scores, expected) <= 5e-6


@pytest.mark.parametrize("documents", [2, 77, 1_000, 10_000])
def test_one_program_serves_any_catalogue(small: Case, documents: int) -> None:
    """Gradients and scores over other numbers of documents than it was exported with."""
    generator = torch.Generator().manual_seed(documents)
    rows = torch.randn(1, 384, generator=generator)
    rows = rows + 0.5 * torch.randn(documents, 384, generator=generator)
    reference = small.reference.over(functional.normalize(rows, dim=-1))
    theta = random_theta(reference.layout.num_values, seed=1)
    batch = random_batch(batch=3, length=9, vocabulary=30522, num_documents=1, seed=2)
    inputs = step_inputs(reference, theta, batch, PLAIN_GRADIENT_CLIP)
    loss, gradient = small.program.call("gradients", inputs)
    expected_loss, expected = reference.plain_gradients(theta, batch)
    # The largest gradient is a bias's, and float32 sums over all documents stand behind it.
    assert relative_error(gradient, expected) <= (BAR if documents < 10_000 else 2 * BAR)
    assert relative_error(loss, expected_loss, at_least=1.0) <= BAR
    (scores,) = small.program.call("scores", inputs)
    assert relative_error(scores, reference.scores(theta, batch)) <= 5e-6


@pytest.mark.parametrize("length", [1, 2, 64, 128])
def test_embeddings_equal_eager(case: Case, length: int) -> None:
    """Of texts longer than a query, too, and of a single token."""
    batch = make_batch(case, 1 if length == 1 else 8, max(length, 2))
    batch.attention_mask[:, length:] = 0
    theta = random_theta(case.num_values, seed=15)
    (found,) = case.program.call("embed", step_inputs(case.reference, theta, batch))
    assert relative_error(found, case.reference.embed(theta, batch)) <= 5e-6


def test_untrained_scores_are_the_librarys_cosines(case: Case) -> None:
    """At theta = 0 the scores are logit scale times what sentence-transformers computes."""
    library = SentenceTransformer(str(open_source(MODEL).folder), device="cpu")
    library.max_seq_length = case.bundle.manifest.documents.embedding_length
    documents = case.bundle.documents()
    passages = [documents[place].passage for place in (0, 7, 300)]
    _, texts = case.bundle.golden()
    scores = case.scores(torch.zeros(case.num_values), golden_batch(case.bundle))
    encode = {"convert_to_tensor": True, "normalize_embeddings": True}
    cosines = library.encode(texts, **encode) @ library.encode(passages, **encode).T
    expected = case.bundle.manifest.logit_scale * cosines
    assert relative_error(scores[:, [0, 7, 300]], expected) <= 5e-6


def test_golden_step_replays_and_would_notice_a_wrong_runtime(case: Case) -> None:
    """The stored step holds on the machine that made it, at the gate and not only at 1e-4."""
    arrays, texts = case.bundle.golden()
    golden = {name: torch.from_numpy(array) for name, array in arrays.items()}
    loss, gradient = case.program.call("gradients", golden)
    (scores,), (embeddings,) = (case.program.call(name, golden) for name in ("scores", "embed"))
    assert relative_error(gradient, golden["expected_gradient"]) <= BAR
    assert relative_error(loss, golden["expected_loss"], at_least=1.0) <= BAR
    assert relative_error(scores, golden["expected_scores"]) <= 5e-6
    assert relative_error(embeddings, golden["expected_embed"]) <= 5e-6
    assert texts == [document.title for document in case.bundle.documents()[:4]]
    wrong = golden["slot_tokens"].clone()
    wrong[0, 1] = -1
    _, other = case.program.call("gradients", golden | {"slot_tokens": wrong})
    tolerance = case.bundle.manifest.golden.gradient_tolerance
    assert relative_error(other, golden["expected_gradient"]) > 10 * tolerance


def test_manifest_says_what_is_in_the_bundle(case: Case) -> None:
    """Layout, bounds, sizes and licences are as the presets promise."""
    manifest = case.bundle.manifest
    count = manifest.documents.count
    expected = {
        "small": {
            "adapter.scale": (384,),
            "adapter.bias": (384,),
            "head.core": (128, 128),
            "head.bias": (count,),
        },
        "paper": {"adapter.weight": (384, 384), "head.rows": (count, 384)},
    }[manifest.preset]
    assert {s.name: s.shape for s in manifest.layout.segments} == expected
    assert manifest.files["program.pte"].bytes <= 95_000_000
    bounds = manifest.program.methods["gradients"].bounds
    assert (bounds["batch"].max, bounds["length"].max, bounds["tokens"].max) == (8, 64, 512)
    assert manifest.program.values_per_document == int(manifest.preset == "small")
    assert [entry.licence for entry in manifest.licences] == ["Apache-2.0", "LicenseRef-notice"]
    assert "MITRE" in manifest.licences[1].notice
    assert manifest.parity.gradient_error <= manifest.parity.gate == BAR
    assert not case.bundle.initial_theta().any()
    assert str(case.bundle.path.parent) not in json.dumps(manifest.model_dump(mode="json"))
