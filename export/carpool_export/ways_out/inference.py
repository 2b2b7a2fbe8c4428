# ruff: noqa: N802, N806, N815  shape suffixes: the legend stands in the docstring
"""A trained theta inside a program that only searches: no theta, no packing, plain inputs.

Adapter and head fold as they do for a server (``merge``): the embedding table holds the adapter,
a vector per document the head and the logit scale. So ``forward`` is the frozen model, one
product with the documents' vectors and their biases.

Shape suffixes: B rows, T slots of a row, D embedding dimension, C documents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from carpool.bundle import Bundle, require_nothing_at
from carpool.bundle.manifest import Method, TensorSpec
from carpool.errors import ParityError
from carpool.files import write_atomically
from carpool_export.gate import SCORES_GATE
from carpool_export.gate_texts import GateTexts
from carpool_export.lowering import MethodToLower, lower
from carpool_export.model import (
    EAGER_ATTENTION,
    PACKED_ATTENTION,
    Encoder,
    Packing,
    build_encoder,
    load_model,
)
from carpool_export.parity import relative_error
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.ways_out.folding import document_vectors, exported_source, fold_adapter

_EXAMPLE = (3, 7)
"""Rows and slots that the tracer cannot mistake for one another."""


class _PaddedPacking(Packing):
    """A rectangle, padding and all: a slot is a token, and padding belongs to no row."""

    @functools.cached_property
    def membership_BN(self) -> Tensor:
        """Float32: 1 where the token is the row's and no padding."""
        return super().membership_BN * self.mask_BT.view(1, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What the program computes.

    Attributes:
        encoder: over the model whose table holds the adapter.
        vectors_CD: float32, a row per document, the logit scale in it.
        biases_1C: float32, or None.
    """

    encoder: Encoder
    vectors_CD: Tensor
    biases_1C: Tensor | None

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The rows' embeddings, float32 ``(B, D)``."""
        batch, length = input_ids.shape
        tokens_BT = torch.arange(batch * length).view(batch, length)
        packing = _PaddedPacking(
            rows_N=torch.arange(batch).view(batch, 1).expand(batch, length).reshape(-1),
            positions_N=torch.arange(length).view(1, length).expand(batch, length).reshape(-1),
            slots_BT=torch.where(attention_mask > 0, tokens_BT, -1),
        )
        tokens_ND = self.encoder.token_embeddings(input_ids.reshape(-1))
        return self.encoder.embed(tokens_ND, packing)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Every document's score for every row, float32 ``(B, C)``."""
        scores_BC = self.embed(input_ids, attention_mask).mm(self.vectors_CD.t())
        return scores_BC if self.biases_1C is None else scores_BC + self.biases_1C


def freeze(
    bundle_path: Path,
    theta_path: Path,
    destination: Path,
    *,
    model: str,
    revision: str | None = None,
) -> float:
    """Writes a ``.pte`` that searches with a trained theta, compared with eager PyTorch before.

    Its methods take ``input_ids`` and ``attention_mask``, int64 ``(B, T)`` within the bundle's
    bounds; rows of tokens first and then padding, of which no row is all. ``forward`` returns the
    scores of the bundle's documents, float32 ``(B, C)``, ``embed`` the embeddings ``(B, D)``.

    Args:
        bundle_path: the bundle that theta was trained for.
        theta_path: a theta of it.
        destination: the file; nothing may be there yet.
        model: the folder, package or hub id that the bundle was exported from.
        revision: of a hub id.

    Returns:
        The largest difference from the eager scores, as a share of the largest score.

    Raises:
        BundleError: the bundle is damaged, or something is at ``destination``.
        ThetaError: theta belongs to another bundle.
        ExportError: ``model`` is not what the bundle was exported from.
        ParityError: the program differs from eager PyTorch; nothing was written.
    """
    require_nothing_at(destination)
    bundle = Bundle.open(bundle_path)
    manifest = bundle.manifest
    theta = bundle.read_theta(theta_path)
    source = exported_source(bundle, model=model, revision=revision)
    corpus, offsets = bundle.corpus(), manifest.layout.parameters(theta)
    weights = manifest.model.weights
    eager = load_model(source.folder, attention=EAGER_ATTENTION, weights=weights)
    packed = load_model(source.folder, attention=PACKED_ATTENTION, weights=weights)
    encoder = build_encoder(packed, eager, source.readout)
    fold_adapter(packed, corpus, offsets)
    vectors = torch.from_numpy(document_vectors(manifest, corpus, offsets))
    width = manifest.model.hidden_size
    search = Search(
        encoder=encoder,
        vectors_CD=vectors[:, :width].contiguous(),
        biases_1C=vectors[:, width:].t().contiguous() if manifest.head.document_bias else None,
    )
    methods = _methods(bundle)
    data = lower(
        {name: _to_lower(getattr(search, name), method) for name, method in methods.items()},
        progress=lambda _: None,
        longest_sum=encoder.longest_sum,
    )
    reference = Reference(
        model=eager.double(),
        layout=manifest.layout,
        readout=source.readout,
        logit_scale=manifest.logit_scale,
        corpus={name: torch.from_numpy(array) for name, array in corpus.items()},
    )
    staged = destination.with_name(f".{destination.name}.gate")
    try:
        write_atomically(staged, data)
        error = _compare(LoadedProgram(staged, methods), reference, torch.from_numpy(theta), bundle)
        staged.rename(destination)
    finally:
        staged.unlink(missing_ok=True)
    return error


def _methods(bundle: Bundle) -> dict[str, Method]:
    manifest = bundle.manifest
    bounds = manifest.program.methods["scores"].bounds
    inputs = tuple(
        TensorSpec(name=name, dtype="int64", shape=("batch", "length"))
        for name in ("input_ids", "attention_mask")
    )
    outputs = {
        "forward": ("scores", manifest.documents.count),
        "embed": ("embeddings", manifest.model.hidden_size),
    }
    return {
        method: Method(
            bounds={"batch": bounds["batch"], "length": bounds["length"]},
            inputs=inputs,
            outputs=(TensorSpec(name=name, dtype="float32", shape=("batch", size)),),
        )
        for method, (name, size) in outputs.items()
    }


def _to_lower(function: Callable[..., Tensor], method: Method) -> MethodToLower:
    batch = Dim("batch", min=method.bounds["batch"].min, max=method.bounds["batch"].max)
    length = Dim("length", min=method.bounds["length"].min, max=method.bounds["length"].max)
    rows = min(_EXAMPLE[0], method.bounds["batch"].max)
    slots = min(_EXAMPLE[1], method.bounds["length"].max)
    ids = torch.zeros(rows, slots, dtype=torch.int64)
    return MethodToLower(
        function=function,
        example_inputs=(ids, torch.ones_like(ids)),
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
    )


def _compare(program: LoadedProgram, reference: Reference, theta: Tensor, bundle: Bundle) -> float:
    """The largest error at the smallest, the largest and a common shape."""
    manifest = bundle.manifest
    texts = GateTexts(
        tokenizer_path=bundle.tokenizer_path,
        prompt=manifest.tokenizer.query_prompt,
        passages=[document.passage for document in bundle.documents()],
    )
    bounds = manifest.program.methods["scores"].bounds
    most, longest = bounds["batch"].max, bounds["length"].max
    worst = 0.0
    for size, length in {(1, 2), (min(3, most), min(17, longest)), (most, longest)}:
        batch = texts.batch(
            batch=size, length=length, num_documents=manifest.documents.count, seed=size
        )
        values = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad():
            pairs = (
                (program.call("forward", values)[0], reference.scores(theta, batch)),
                (program.call("embed", values)[0], reference.embed(theta, batch)),
            )
        error = max(relative_error(found, expected) for found, expected in pairs)
        if not error <= SCORES_GATE:
            raise ParityError(
                f"scores at batch {size}, length {length}: expected an error of at most "
                f"{SCORES_GATE:.1e} of the largest eager value, got {error:.1e}. Nothing was "
                "written; this model cannot be exported as it is."
            )
        worst = max(worst, error)
    return worst
