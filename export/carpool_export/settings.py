"""What may be chosen for an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from carpool_export.model import Pooling
from carpool_export.model.weights import Weights
from carpool_export.trainables import PRESETS, Kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What may be chosen.

    Attributes:
        kinds: what is trained.
        revision: of a model that is a hub id.
        pooling: of a model that does not say itself.
        query_prompt: put before every query, instead of the model's own.
        document_prompt: likewise before every document.
        logit_scale: logits per unit of cosine.
        document_length: tokens of a document that its embedding is made from.
        max_batch: most rows in a call.
        max_length: most tokens in a row; the program's memory is planned for it.
        max_documents: of the catalogue, where the head takes any number.
        scales: by segment of theta, instead of the preset's.
        weights: float32, or int8 per channel for a bundle of about a third.
        licence: of the model, an SPDX expression, instead of what its model card states.
        documents_licence: likewise of the documents.
        notices: texts that must go with the documents; ``NOTICE`` beside their file if empty.
        etrecord: where ExecuTorch's record of the lowering goes; none is kept if None.
    """

    kinds: Kinds = PRESETS["small"]
    revision: str | None = None
    pooling: Pooling | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    logit_scale: float = 20.0
    document_length: int = 128
    max_batch: int = 8
    max_length: int = 64
    max_documents: int = 100_000
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weights: Weights = "float32"
    licence: str | None = None
    documents_licence: str | None = None
    notices: tuple[str, ...] = ()
    etrecord: Path | None = None
