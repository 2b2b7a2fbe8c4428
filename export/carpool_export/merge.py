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

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from carpool.bundle import Bundle, Manifest, staging_folder
from carpool.errors import ExportError
from carpool.files import sync_directory
from carpool_export.merged_chain import write_chain
from carpool_export.model import EAGER_ATTENTION, load_model
from carpool_export.source import ModelSource, find_model, is_chain, open_source

VECTORS_NAME = "documents.safetensors"

Floats = NDArray[np.float32]


def merge(
    bundle_path: Path,
    theta_path: Path,
    destination: Path,
    *,
    model: str,
    revision: str | None = None,
) -> None:
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
        model: the folder, package or hub id that the bundle was exported from.
        revision: of a hub id.

    Raises:
        BundleError: the bundle is damaged, or something is at ``destination``.
        ThetaError: theta belongs to another bundle.
        ExportError: ``model`` is not what the bundle was exported from.
    """
    bundle = Bundle.open(bundle_path)
    manifest = bundle.manifest
    theta = bundle.read_theta(theta_path)
    # a folder that does not say how it pools was told at export
    pooling = None if is_chain(find_model(model, revision=revision)) else manifest.model.pooling
    source = open_source(model, revision=revision, pooling=pooling)
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
        eager = load_model(source.folder, attention=EAGER_ATTENTION, weights=manifest.model.weights)
        _write_soft_model(staging, source, eager, bundle.corpus(), offsets)
        write_chain(staging, source, manifest)
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


def _write_soft_model(
    folder: Path,
    source: ModelSource,
    model: PreTrainedModel,
    corpus: Mapping[str, Floats],
    offsets: Mapping[str, Floats],
) -> None:
    """The library's own files of the model, with the adapter in its embedding table."""
    table: Any = model.get_input_embeddings()  # typed as any module
    # Gemma multiplies its rows before anything sees them.
    scale = float(getattr(table, "embed_scale", 1.0))
    rows = soft_table(scale * table.weight.double().numpy(), corpus, offsets)
    table.weight.copy_(torch.from_numpy(rows / np.float32(scale)))
    model.save_pretrained(folder)
    for path in sorted(source.folder.iterdir()):
        copied = path.suffix in {".json", ".txt"} and path.name not in _NOT_COPIED
        if path.is_file() and copied and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


_NOT_COPIED = {"data_config.json", "model.safetensors.index.json"}


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
