"""A sentence-transformers folder with dense layers and prompts, against that library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import golden_batch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from carpool.theta import write_theta
from carpool_device.runtime import DeviceProgram
from carpool_export.exporter import export_bundle
from carpool_export.parity import random_theta, relative_error
from carpool_export.runner import LoadedProgram
from carpool_export.settings import ExportSettings
from carpool_export.trainables import Kinds
from carpool_export.ways_out.merge import merge


@pytest.fixture
def chain_model(tiny_model: Path) -> Path:
    """The tiny model with CLS pooling, a dense layer with tanh and one without, and prompts."""
    (tiny_model / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 24, "pooling_mode_cls_token": true, '
        '"pooling_mode_mean_tokens": false}'
    )
    modules = json.loads((tiny_model / "modules.json").read_text())
    generator = torch.Generator().manual_seed(1)
    for place, (inputs, outputs, activation) in enumerate(
        [(24, 16, "activation.Tanh"), (16, 12, "linear.Identity")], start=2
    ):
        folder = tiny_model / f"{place}_Dense"
        folder.mkdir()
        config = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": place == 2,
            "activation_function": f"torch.nn.modules.{activation}",
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {"linear.weight": torch.randn(outputs, inputs, generator=generator)}
        if place == 2:
            tensors["linear.bias"] = torch.randn(outputs, generator=generator)
        save_file(tensors, folder / "model.safetensors")
        modules.append(
            {
                "idx": place,
                "path": folder.name,
                "type": "sentence_transformers.models.Dense",
            }
        )
    for module in modules:
        module["name"] = str(module["idx"])
    (tiny_model / "modules.json").write_text(json.dumps(modules))
    (tiny_model / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "red one ", "document": "blue "}})
    )
    return tiny_model


@pytest.mark.slow
def test_embeddings_are_those_of_the_library(
    chain_model: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """Queries and documents with their prompts; and the merged model's scores are the program's."""
    settings = ExportSettings(
        kinds=Kinds(adapter="low-rank", head="map", document_bias=True, adapter_rank=3),
        max_batch=4,
        max_length=20,
        document_length=24,
    )
    bundle = export_bundle(
        str(chain_model), tiny_documents, tmp_path / "bundle", settings, announce=lambda _: None
    )
    library = SentenceTransformer(str(chain_model), device="cpu")
    passages = [document.passage for document in bundle.documents()]
    expected = library.encode_document(passages, convert_to_tensor=True, normalize_embeddings=True)
    assert relative_error(torch.from_numpy(bundle.corpus()["documents"]), expected) <= 5e-6

    device = DeviceProgram.load(bundle)
    queries = ["green cat", "two three dog runs .", "red"]
    tokens = device.tokenizer.pack(device.tokenizer.encode(queries))
    found = torch.from_numpy(device.embed(bundle.initial_theta(), tokens))
    expected = library.encode_query(queries, convert_to_tensor=True, normalize_embeddings=True)
    assert relative_error(found, expected) <= 5e-6

    layout = bundle.manifest.layout
    theta, path = random_theta(layout.num_values, seed=3), tmp_path / "theta.safetensors"
    write_theta(path, theta.numpy(), layout=layout, bundle_id=bundle.id, round_number=1)
    merge(bundle.path, path, tmp_path / "merged", model=str(chain_model))
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    vectors = load_file(tmp_path / "merged" / "documents.safetensors")["vectors"]
    _, texts = bundle.golden()
    (scores,) = LoadedProgram(bundle.program_path, bundle.manifest.program.methods).call(
        "scores",
        {
            "theta": theta,
            **{name: torch.from_numpy(array) for name, array in bundle.corpus().items()},
            **golden_batch(bundle).packed(),
        },
    )
    similarity = merged.similarity(merged.encode_query(texts, convert_to_tensor=True), vectors)
    assert relative_error(scores, similarity) <= 1e-5
