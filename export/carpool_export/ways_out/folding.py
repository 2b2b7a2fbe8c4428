"""A trained theta folded into what a model and a catalogue already have.

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

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from carpool.bundle import Bundle, Manifest
from carpool.errors import ExportError
from carpool_export.source import ModelSource, find_model, is_chain, open_source

Floats = NDArray[np.float32]


def exported_source(bundle: Bundle, *, model: str, revision: str | None) -> ModelSource:
    """The model that a bundle was exported from.

    Raises:
        ExportError: ``model`` is another one, or cannot be read.
    """
    manifest = bundle.manifest
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
    return source


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


def fold_adapter(
    model: PreTrainedModel, corpus: Mapping[str, Floats], offsets: Mapping[str, Floats]
) -> None:
    """Puts the adapter into the model's embedding table, in place."""
    table: Any = model.get_input_embeddings()  # typed as any module
    # Gemma multiplies its rows before anything sees them.
    scale = float(getattr(table, "embed_scale", 1.0))
    rows = soft_table(scale * table.weight.double().numpy(), corpus, offsets)
    table.weight.copy_(torch.from_numpy(rows / np.float32(scale)))
