"""A trained theta becomes a plain sentence-transformers model and one vector per document.

What folds into what, with E the embedding table, d a document, z a query's embedding, U the
basis, and all sums in float64 before they are rounded to float32:

- scale-bias adapter: each row of E becomes ``(1 + scale) * row + bias``; linear: ``W row``;
  low-rank: ``row + up (down^T row)``.
- rows head: a document's vector is ``logit_scale * w_d``.
- map and core head: ``<d, z + M z> = <d + M^T d, z>``, so its vector is ``logit_scale`` times the
  left side of that product; for the core head M is ``U M U^T``.
- document bias: one more value of each vector; a dense layer of the model appends the constant 1
  that it is multiplied with.

So every part folds, and the dot product of query and document vector is the program's score.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from carpool.bundle import Bundle, Manifest, staging_folder
from carpool.errors import ExportError
from carpool.files import sync_directory
from carpool_export.source import ModelSource, open_source

VECTORS_NAME = "documents.safetensors"

Floats = NDArray[np.float32]


def merge(bundle_path: Path, theta_path: Path, destination: Path, *, model: str) -> None:
    """Writes the trained model as a sentence-transformers folder.

    Beside the model's own files there are ``documents.safetensors`` (``vectors``, float32, a row
    per document), ``documents.jsonl`` in the same order, and the bundle's licences. The model's
    similarity is the dot product; it cuts queries where the bundle's devices cut them. New
    documents are embedded with the untrained model, as the exporter does.

    Guarantees: ``destination`` appears whole or not at all.

    Args:
        bundle_path: the bundle that theta was trained for.
        theta_path: a theta of it; the one inside it gives the untrained model.
        destination: where the folder shall be; nothing may be there yet.
        model: the folder or package that the bundle was exported from.

    Raises:
        BundleError: the bundle is damaged, or something is at ``destination``.
        ThetaError: theta belongs to another bundle.
        ExportError: ``model`` is not what the bundle was exported from.
    """
    bundle = Bundle.open(bundle_path)
    manifest = bundle.manifest
    theta = bundle.read_theta(theta_path)
    source = open_source(model)
    found = source.weights_sha256()
    if found != manifest.model.weights_sha256:
        raise ExportError(
            f"{model}: expected the model that the bundle was exported from "
            f"({manifest.model.name}, weights {manifest.model.weights_sha256[:12]}), got "
            f"{source.name}, weights {found[:12]}. Pass the right one with --model."
        )
    offsets = manifest.layout.parameters(theta)
    vectors = document_vectors(manifest, bundle.corpus(), offsets)
    with staging_folder(destination) as staging:
        _write_model(staging, source, manifest, bundle.corpus(), offsets)
        save_file({"vectors": vectors}, staging / VECTORS_NAME)
        shutil.copyfile(bundle.path / manifest.documents.file, staging / "documents.jsonl")
        (staging / "README.md").write_text(_card(manifest, bundle.id), encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(destination)
        sync_directory(destination.parent)


def document_vectors(
    manifest: Manifest, corpus: Mapping[str, Floats], offsets: Mapping[str, Floats]
) -> Floats:
    """What a query's embedding is multiplied with: float32, a row per document.

    Args:
        manifest: names the head and the logit scale.
        corpus: the bundle's frozen inputs.
        offsets: the head's parameters less their initial values, by segment name.
    """
    documents = corpus["documents"].astype(np.float64)
    if manifest.head.kind == "rows":
        documents = documents + offsets["head.rows"]
    elif manifest.head.kind == "core":
        basis = corpus["basis"].astype(np.float64)
        documents = documents + documents @ basis @ offsets["head.core"] @ basis.T
    elif manifest.head.kind == "map":
        documents = documents + documents @ offsets["head.map"].astype(np.float64)
    vectors = manifest.logit_scale * documents
    if manifest.head.document_bias:
        vectors = np.hstack([vectors, offsets["head.bias"][:, None]])
    return np.ascontiguousarray(vectors, dtype=np.float32)


def soft_table(
    table: Floats, corpus: Mapping[str, Floats], offsets: Mapping[str, Floats]
) -> Floats:
    """The embedding table with the adapter in it: float32, shape as ``table``."""
    rows = table.astype(np.float64)
    if "adapter.weight" in offsets:
        rows = rows + rows @ offsets["adapter.weight"].T.astype(np.float64)
    elif "adapter.up" in offsets:
        down = corpus["adapter_down"].astype(np.float64) + offsets["adapter.down"]
        rows = rows + rows @ down @ offsets["adapter.up"].T
    elif "adapter.scale" in offsets:
        rows = rows * (1.0 + offsets["adapter.scale"]) + offsets["adapter.bias"]
    return np.ascontiguousarray(rows, dtype=np.float32)


def _write_model(
    folder: Path,
    source: ModelSource,
    manifest: Manifest,
    corpus: Mapping[str, Floats],
    offsets: Mapping[str, Floats],
) -> None:
    for path in sorted(source.folder.iterdir()):
        copied = path.suffix in {".json", ".txt"} and path.name != "data_config.json"
        if path.is_file() and copied:
            shutil.copyfile(path, folder / path.name)
    weights = source.folder / "model.safetensors"
    tensors = load_file(weights)
    names = [name for name in tensors if name.endswith("word_embeddings.weight")]
    if len(names) != 1:
        raise ExportError(f"{weights}: expected one table of word embeddings, got {names}.")
    tensors[names[0]] = soft_table(tensors[names[0]], corpus, offsets)
    with safe_open(weights, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata=metadata)

    width = source.hidden_size
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": manifest.tokenizer.max_length}
    )
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    chain: list[tuple[str, str, dict[str, Any] | None]] = [
        ("Transformer", "", None),
        (
            "Pooling",
            "1_Pooling",
            {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
        ),
        ("Normalize", "2_Normalize", None),
    ]
    if manifest.head.document_bias:
        dense = {
            "in_features": width,
            "out_features": width + 1,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        chain.append(("Dense", "3_Dense", dense))
    for _, name, config in chain[1:]:
        (folder / name).mkdir()
        if config is not None:
            _write_json(folder / name / "config.json", config)
    if manifest.head.document_bias:
        append_one = {
            "linear.weight": np.eye(width + 1, width, dtype=np.float32),
            "linear.bias": np.eye(width + 1, dtype=np.float32)[width],
        }
        save_file(append_one, folder / "3_Dense" / "model.safetensors", metadata={"format": "pt"})
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, path, _) in enumerate(chain)
    ]
    _write_json(folder / "modules.json", modules)


def _card(manifest: Manifest, bundle_id: str) -> str:
    licence = manifest.licences[0].licence
    notices = "\n\n".join(
        f"## {entry.applies_to}: {entry.licence}\n\n{entry.notice}" for entry in manifest.licences
    )
    return (
        f"---\nlicense: {licence}\nlibrary_name: sentence-transformers\n---\n\n"
        f"# {manifest.model.name}, trained with carpool\n\n"
        f"Merged from bundle `{bundle_id}`. The dot product of a query's embedding and a row of "
        f"`vectors` in `{VECTORS_NAME}` is the score of that row's document in `documents.jsonl`."
        f"\n\n{notices}\n"
    )


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401  any JSON value
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
