"""More documents for a bundle, without export and without training.

The program takes any catalogue, so only the files of the catalogue change: a device that has the
bundle fetches those and neither the program nor the tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle.manifest import licences_of_documents
from carpool.data.corpus import Document, read_documents, write_lines
from carpool.errors import BundleError, CorpusError, DeviceError
from carpool.theta import write_theta, zero_theta
from carpool_device.runtime import DeviceProgram
from carpool_device.selftest import replay_golden_step, require_passed


def add_documents(
    bundle_path: Path,
    documents_path: Path,
    destination: Path,
    *,
    theta_path: Path | None = None,
    notices: Sequence[str] = (),
    licence: str | None = None,
) -> Bundle:
    """A bundle with more documents behind those of another; its old scores stay as they are.

    The new documents are embedded by the bundle's own program, untrained, as the old ones were;
    their values of theta are zero. The golden step must pass on this machine first. Directions
    that a core head maps within stay those of the old documents: theta means them.

    Guarantees: ``destination`` appears whole or not at all; the program, the tokenizer and the
    golden step are byte for byte the old ones.

    Args:
        bundle_path: the old bundle.
        documents_path: a ``documents.jsonl`` with the new documents alone.
        destination: where the new bundle shall be; nothing may be there yet.
        theta_path: a theta that was trained for the old bundle, to ship in the new one; without
            it the old one's own is.
        notices: texts that must go with the new documents.
        licence: of the new documents, an SPDX expression as ``carpool.licences`` spells it.

    Raises:
        BundleError: the bundle is damaged, or its program is for one catalogue alone.
        ThetaError: theta belongs to another bundle.
        CorpusError: a malformed line, or the id of a document that the bundle has.
        DeviceError: too many documents, or this runtime fails the golden step.
    """
    bundle = Bundle.open(bundle_path)
    manifest = bundle.manifest
    bounds = manifest.program.methods["scores"].bounds
    if "documents" not in bounds:
        raise BundleError(
            f"{bundle_path}: expected a program that takes any catalogue, got a head of kind "
            f"{manifest.head.kind!r}, which has parameters for its own documents. "
            "Export a bundle with head core, map or none."
        )
    old, new = bundle.documents(), read_documents(documents_path)
    _refuse_known(documents_path, old, new)
    count = len(old) + len(new)
    if count > bounds["documents"].max:
        raise DeviceError(
            f"{documents_path}: expected at most {bounds['documents'].max - len(old)} more "
            f"documents, which the program takes beside its {len(old)}, got {len(new)}. "
            "Export the bundle again with a larger --max-documents."
        )
    theta = bundle.initial_theta() if theta_path is None else bundle.read_theta(theta_path)
    program = DeviceProgram.load(bundle)
    require_passed(replay_golden_step(program), program=program)
    corpus = bundle.corpus()
    corpus["documents"] = np.concatenate([corpus["documents"], _embed(program, new)])
    layout = manifest.layout
    if manifest.program.values_per_document:
        layout = layout.for_documents(count)
    longer = zero_theta(layout)
    longer[: theta.size] = theta
    with staging_folder(destination) as staging:
        for name in (
            manifest.program.shipped_file,
            manifest.tokenizer.file,
            manifest.golden.file,
        ):
            shutil.copyfile(bundle.path / name, staging / name)
        write_lines(staging / manifest.documents.file, [*old, *new])
        save_file(corpus, staging / manifest.documents.corpus_file)
        path = staging / manifest.theta_file
        write_theta(path, longer, layout=layout, bundle_id=None, round_number=0)
        documents = manifest.documents.model_copy(update={"count": count})
        fields = {name: getattr(manifest, name) for name in type(manifest).model_fields}
        for name in ("files", "layout_id", "signature"):
            del fields[name]
        fields |= {
            "layout": layout,
            "documents": documents,
            "licences": (*manifest.licences, *licences_of_documents(notices, licence=licence)),
        }
        return finish_bundle(staging, destination, fields)


def _refuse_known(path: Path, old: Sequence[Document], new: Sequence[Document]) -> None:
    known = {document.id for document in old}
    for number, document in enumerate(new, start=1):
        if document.id in known:
            raise CorpusError(
                f"{path}: document {number} of {len(new)}: the bundle has a document with id "
                f"{document.id!r}; expected new ids alone."
            )


def _embed(program: DeviceProgram, documents: Sequence[Document]) -> NDArray[np.float32]:
    """The documents' embeddings by the untrained model: float32, ``(documents, d)``."""
    manifest = program.bundle.manifest
    rows = program.tokenizer.encode(
        [document.passage for document in documents],
        prompt=manifest.documents.prompt,
        max_length=manifest.documents.embedding_length,
    )
    untrained = zero_theta(manifest.layout)
    embeddings = np.zeros((len(rows), manifest.model.hidden_size), dtype=np.float32)
    for places in program.batches(rows):
        tokens = program.tokenizer.pack([rows[place] for place in places])
        embeddings[places] = program.embed(untrained, tokens)
    return embeddings
