"""A trained theta becomes a plain sentence-transformers model and one vector per document."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import save_file
from transformers import PreTrainedModel

from carpool.bundle import Bundle, Manifest, staging_folder
from carpool.files import sync_directory
from carpool.licences import NOT_STATED
from carpool_export.model import EAGER_ATTENTION, load_model
from carpool_export.source import ModelSource
from carpool_export.ways_out.folding import (
    Floats,
    document_vectors,
    exported_source,
    fold_adapter,
)
from carpool_export.ways_out.merged_chain import write_chain

VECTORS_NAME = "documents.safetensors"


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
    source = exported_source(bundle, model=model, revision=revision)
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


def _write_soft_model(
    folder: Path,
    source: ModelSource,
    model: PreTrainedModel,
    corpus: Mapping[str, Floats],
    offsets: Mapping[str, Floats],
) -> None:
    """The library's own files of the model, with the adapter in its embedding table."""
    fold_adapter(model, corpus, offsets)
    model.save_pretrained(folder)
    for path in sorted(source.folder.iterdir()):
        copied = path.suffix in {".json", ".txt"} and path.name not in _NOT_COPIED
        if path.is_file() and copied and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


_NOT_COPIED = {"data_config.json", "model.safetensors.index.json"}


def _card(manifest: Manifest, bundle_id: str) -> str:
    licence = manifest.licences[0].licence
    # The hub writes SPDX's identifiers in lower case, and has one word for all others.
    on_hub = "other" if licence == NOT_STATED or "LicenseRef" in licence else licence.lower()
    notices = "\n\n".join(
        f"## {entry.applies_to}: {entry.licence}\n\n{entry.notice}" for entry in manifest.licences
    )
    return (
        f"---\nlicense: {on_hub}\nlibrary_name: sentence-transformers\n---\n\n"
        f"# {manifest.model.name}, trained with carpool\n\n"
        f"Merged from bundle `{bundle_id}`. The dot product of a query's embedding and a row of "
        f"`vectors` in `{VECTORS_NAME}` is the score of that row's document in `documents.jsonl`."
        f"\n\n{notices}\n"
    )
