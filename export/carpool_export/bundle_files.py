"""A finished export as a bundle's files and manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from carpool.bundle import manifest as schema
from carpool.bundle.weights import expand_once
from carpool.data.corpus import Document, write_lines
from carpool.files import sha256_of_file
from carpool.theta import write_theta, zero_theta
from carpool_export import golden
from carpool_export.corpus import load_tokenizer
from carpool_export.model.weights import pack_program
from carpool_export.program import StepFunctions
from carpool_export.reference import Reference
from carpool_export.settings import ExportSettings
from carpool_export.source import ModelSource
from carpool_export.trainables import preset_name

PROGRAM_NAME = "program.pte"
PACKED_NAME = "program.pte.int8"
RUNTIME = schema.RuntimeRange(at_least="1.5.0", below="1.6.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedExport:
    """All that a bundle is written from, beside its program.

    Attributes:
        source: the model.
        documents: the catalogue.
        functions: what the program computes.
        methods: how it may be called.
        reference: the same in eager PyTorch, with the frozen inputs.
        settings: what was chosen.
    """

    source: ModelSource
    documents: list[Document]
    functions: StepFunctions
    methods: dict[str, schema.Method]
    reference: Reference
    settings: ExportSettings


def write_files(staging: Path, export: FinishedExport) -> None:
    """Everything but the program and the manifest, into ``staging``."""
    source, reference, settings = export.source, export.reference, export.settings
    shutil.copyfile(source.tokenizer_path, staging / "tokenizer.json")
    write_lines(staging / "documents.jsonl", export.documents)
    save_file(reference.corpus, staging / "corpus.safetensors")
    write_theta(
        staging / "theta.safetensors",
        zero_theta(reference.layout),
        layout=reference.layout,
        bundle_id=None,
        round_number=0,
    )
    step = golden.golden_step(
        reference,
        load_tokenizer(source.tokenizer_path, max_length=settings.max_length),
        export.documents,
        prompt=source.prompts.query,
        any_catalogue=export.functions.trainables.any_catalogue,
        max_batch=settings.max_batch,
    )
    save_file(
        step.tensors,
        staging / "golden.safetensors",
        metadata={"texts": json.dumps(step.texts, ensure_ascii=False)},
    )


def pack_weights(staging: Path, program: schema.Program, model: PreTrainedModel) -> schema.Program:
    """Replaces the program in ``staging`` by its packed form, once that expands to it again.

    Args:
        staging: the folder that becomes the bundle.
        program: what the manifest would say of it.
        model: whose rounded weights are in it.

    Returns:
        What the manifest shall say.

    Raises:
        BundleError: the packed form expands to something else: a defect here.
    """
    path, packed_path = staging / program.file, staging / PACKED_NAME
    pieces, segments = pack_program(path.read_bytes(), model)
    packed = schema.PackedWeights(
        file=PACKED_NAME,
        program=schema.FileEntry(bytes=path.stat().st_size, sha256=sha256_of_file(path)),
        segments=segments,
    )
    path.unlink()
    with packed_path.open("wb") as file:
        file.writelines(pieces)
    expand_once(packed_path, path, packed)
    path.unlink()
    return program.model_copy(update={"packed": packed})


def manifest_fields(export: FinishedExport) -> dict[str, Any]:
    """The manifest's fields that follow from the export."""
    source, settings = export.source, export.settings
    trainables = export.functions.trainables
    return {
        "carpool_version": importlib.metadata.version("carpool"),
        "preset": preset_name(settings.kinds),
        "model": schema.SourceModel(
            name=source.name,
            architecture=source.architecture,
            hidden_size=source.width,
            pooling=source.readout.pooling,
            normalize=source.readout.normalize,
            weights=settings.weights,
            weights_sha256=source.weights_sha256(),
        ),
        "adapter": trainables.adapter.describe(),
        "head": trainables.head.describe(document_bias=trainables.document_bias),
        "logit_scale": settings.logit_scale,
        "layout": trainables.layout,
        "theta_file": "theta.safetensors",
        "documents": schema.Documents(
            file="documents.jsonl",
            count=len(export.documents),
            embedding_length=settings.document_length,
            prompt=source.prompts.document,
            corpus_file="corpus.safetensors",
        ),
        "program": schema.Program(
            file=PROGRAM_NAME,
            packed=None,
            runtime=RUNTIME,
            values_per_document=trainables.values_per_document,
            methods=export.methods,
        ),
        "tokenizer": schema.Tokenizer(
            file="tokenizer.json",
            kind=source.tokenizer_kind,
            query_prompt=source.prompts.query,
            max_length=settings.max_length,
        ),
        "golden": schema.Golden(
            file="golden.safetensors",
            gradient_tolerance=golden.GRADIENT_TOLERANCE,
            loss_tolerance=golden.LOSS_TOLERANCE,
            scores_tolerance=golden.SCORES_TOLERANCE,
            embed_tolerance=golden.EMBED_TOLERANCE,
        ),
    }
