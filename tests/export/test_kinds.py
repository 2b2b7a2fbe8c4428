"""Every adapter with every head, with and without a document bias, on a small random BERT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from export_cases import golden_batch, step_inputs
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from carpool.theta import write_theta
from carpool_export.corpus import principal_directions
from carpool_export.exporter import export_bundle
from carpool_export.lowering import private
from carpool_export.lowering.decompositions import DECOMPOSITIONS
from carpool_export.methods import Bounds, describe_methods, methods_to_lower
from carpool_export.model import (
    EAGER_ATTENTION,
    PACKED_ATTENTION,
    Readout,
    build_encoder,
    load_model,
)
from carpool_export.parity import random_batch, random_theta, relative_error
from carpool_export.program import StepFunctions
from carpool_export.reference import Reference, clipped_sum
from carpool_export.runner import LoadedProgram
from carpool_export.settings import ExportSettings
from carpool_export.trainables import AdapterKind, HeadKind, Kinds, build_trainables
from carpool_export.ways_out.merge import merge

WIDTH, DOCUMENTS, VOCABULARY = 24, 9, 17

PAIRS = [
    Kinds(adapter=adapter, head=head, document_bias=bias, adapter_rank=3, head_rank=5)
    for adapter, head, bias in itertools.product(
        get_args(AdapterKind), get_args(HeadKind), (False, True)
    )
    if (adapter, head, bias) != ("none", "none", False)
]


def named(kinds: Kinds) -> str:
    return f"{kinds.adapter}+{kinds.head}{'+bias' if kinds.document_bias else ''}"


def frozen_for(kinds: Kinds) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    documents = functional.normalize(torch.randn(DOCUMENTS, WIDTH), dim=-1)
    frozen = {"documents": documents}
    if kinds.head == "core":
        frozen["basis"] = principal_directions(documents, rank=5)
    if kinds.adapter == "low-rank":
        frozen["adapter_down"] = principal_directions(torch.randn(30, WIDTH), rank=3)
    return frozen


def functions_for(kinds: Kinds, model: Path) -> StepFunctions:
    return StepFunctions(
        encoder=build_encoder(
            load_model(model, attention=PACKED_ATTENTION),
            load_model(model, attention=EAGER_ATTENTION),
            Readout(),
        ),
        trainables=build_trainables(
            kinds, width=WIDTH, num_documents=DOCUMENTS, logit_scale=20.0, scales={}
        ),
    )


def call(functions: StepFunctions, method: str, inputs: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401  a tensor or several
    return getattr(functions, method)(*(inputs[name] for name in functions.inputs_of(method)))


@pytest.mark.parametrize("kinds", PAIRS, ids=named)
def test_step_equals_eager(kinds: Kinds, tiny_model: Path) -> None:
    """Loss, plain and clipped gradient and scores, against autograd in float64, to 2e-6."""
    functions, frozen = functions_for(kinds, tiny_model), frozen_for(kinds)
    layout = functions.trainables.layout
    reference = Reference(
        model=load_model(tiny_model, attention=EAGER_ATTENTION).double(),
        layout=layout,
        readout=Readout(),
        logit_scale=20.0,
        corpus=frozen,
    )
    theta = 6.0 * random_theta(layout.num_values, seed=1)
    batch = random_batch(batch=4, length=7, vocabulary=VOCABULARY, num_documents=DOCUMENTS, seed=2)
    losses, examples = reference.example_gradients(theta, batch)
    bound = 0.9 * float(examples[batch.example_weights != 0].norm(dim=1).median())
    assert tuple(functions.trainables.frozen_shapes) == tuple(frozen)
    inputs = step_inputs(reference, theta, batch)
    for clip in (1e30, bound):
        inputs["l2_clip_norm"] = torch.tensor([clip])
        loss, gradient = call(functions, "gradients", inputs)
        expected = clipped_sum(examples, batch.example_weights, l2_clip_norm=clip)
        assert relative_error(gradient, expected) <= 2e-6
        assert relative_error(loss, (losses * batch.example_weights).sum().reshape(1)) <= 2e-6
    scores = call(functions, "scores", inputs)
    assert relative_error(scores, reference.scores(theta, batch)) <= 2e-6
    assert relative_error(call(functions, "embed", inputs), reference.embed(theta, batch)) <= 2e-6
    untrained = call(functions, "scores", inputs | {"theta": torch.zeros_like(theta)})
    cosines = reference.scores(torch.zeros_like(theta), batch) / 20.0
    assert relative_error(untrained, 20.0 * cosines) <= 2e-6
    assert float(cosines.abs().max()) <= 1.0


def test_a_program_without_adapter_has_no_backward_pass_through_the_blocks(
    tiny_model: Path,
) -> None:
    """The derivative of gelu, of which there is one per block, is not in it."""

    def derivatives(kinds: Kinds) -> int:
        functions = functions_for(kinds, tiny_model)
        bounds = Bounds(batch=4, length=7, embed_length=7, documents=50)
        methods = methods_to_lower(functions, describe_methods(functions, bounds))
        inputs = methods["gradients"].example_inputs
        graph = private.trace(functions.gradients, inputs, decompositions=DECOMPOSITIONS).graph
        return sum(node.target is torch.ops.aten.exp.default for node in graph.nodes)

    assert derivatives(Kinds(adapter="scale-bias", head="map", document_bias=False)) == 1
    assert derivatives(Kinds(adapter="none", head="map", document_bias=False)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [kinds for kinds in PAIRS if kinds.document_bias], ids=named)
def test_exported_pair_passes_the_gate_and_merges(
    kinds: Kinds, tiny_model: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """The finished program against eager PyTorch, and the merged model against the program."""
    settings = ExportSettings(kinds=kinds, max_length=16, document_length=16, max_batch=4)
    bundle = export_bundle(
        str(tiny_model), tiny_documents, tmp_path / "bundle", settings, announce=lambda _: None
    )
    manifest = bundle.manifest
    assert (manifest.adapter.kind, manifest.head.kind) == (kinds.adapter, kinds.head)
    assert manifest.preset == "custom"  # the ranks are not a preset's
    theta = random_theta(manifest.layout.num_values, seed=3)
    path = tmp_path / "theta.safetensors"
    write_theta(path, theta.numpy(), layout=manifest.layout, bundle_id=bundle.id, round_number=1)
    merge(bundle.path, path, tmp_path / "merged", model=str(tiny_model))
    vectors = load_file(tmp_path / "merged" / "documents.safetensors")["vectors"]
    _, texts = bundle.golden()
    library = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    expected = library.similarity(library.encode(texts, convert_to_tensor=True), vectors)
    corpus = {name: torch.from_numpy(array) for name, array in bundle.corpus().items()}
    inputs = {"theta": theta, **corpus, **golden_batch(bundle).packed()}
    (scores,) = LoadedProgram(bundle.program_path, manifest.program.methods).call("scores", inputs)
    assert relative_error(scores, expected) <= 1e-5
