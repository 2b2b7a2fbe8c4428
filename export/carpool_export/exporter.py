"""A model and a documents file become a bundle, or nothing is written at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle import manifest as schema
from carpool.data.corpus import Document, read_documents, read_notice
from carpool.errors import ExportError
from carpool.licences import NOT_STATED, stated_licence
from carpool_export.bundle_files import (
    PROGRAM_NAME,
    FinishedExport,
    manifest_fields,
    pack_weights,
    write_files,
)
from carpool_export.corpus import embed_passages, load_tokenizer, principal_directions
from carpool_export.gate import check_parity, gate_shapes
from carpool_export.gate_texts import GateTexts
from carpool_export.lowering import lower
from carpool_export.methods import (
    MIN_DOCUMENTS,
    MIN_LENGTH,
    Bounds,
    describe_methods,
    methods_to_lower,
)
from carpool_export.model import (
    EAGER_ATTENTION,
    PACKED_ATTENTION,
    build_encoder,
    load_model,
)
from carpool_export.program import StepFunctions
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.settings import ExportSettings
from carpool_export.source import ModelSource, open_source
from carpool_export.source.chain import Prompts
from carpool_export.trainables import (
    Trainables,
    build_trainables,
)

STAGES = (
    "reading the model",
    "tracing gradients",
    "tracing scores",
    "tracing embed",
    "lowering gradients and scores and embed",
    "embedding the documents",
    "comparing with eager PyTorch",
    "writing",
)
"""What ``export_bundle`` announces, in order."""


def export_bundle(
    model: str,
    documents_path: Path,
    destination: Path,
    settings: ExportSettings,
    *,
    announce: Callable[[str], None],
) -> Bundle:
    """Makes a bundle whose program agrees with eager PyTorch.

    Guarantees: ``destination`` appears whole, after the finished program passed the gate, or
    not at all.

    Args:
        model: a folder or an installed model package.
        documents_path: a ``documents.jsonl``.
        destination: where the bundle shall be; nothing may be there yet.
        settings: the rest.
        announce: told each of ``STAGES`` before it begins.

    Raises:
        ExportError: a model or setting that is refused, or that cannot be lowered.
        ParityError: the program differs from eager PyTorch.
        CorpusError: a malformed documents file.
        BundleError: ``destination`` is there already.
    """
    source = open_source(model, revision=settings.revision, pooling=settings.pooling)
    source = dataclasses.replace(source, prompts=_prompts(source, settings))
    documents = read_documents(documents_path)
    _check_settings(settings, source, num_documents=len(documents))
    licences = _licences(source, documents_path, settings)
    trainables = build_trainables(
        settings.kinds,
        width=source.width,
        token_width=source.token_width,
        num_documents=len(documents),
        logit_scale=settings.logit_scale,
        scales=settings.scales,
    )
    with staging_folder(destination) as staging:
        announce(STAGES[0])
        weights = settings.weights
        eager = load_model(source.folder, attention=EAGER_ATTENTION, weights=weights)
        packed = load_model(source.folder, attention=PACKED_ATTENTION, weights=weights)
        encoder = build_encoder(packed, eager, source.readout)
        functions = StepFunctions(encoder=encoder, trainables=trainables)
        bounds = _bounds(settings)
        methods = describe_methods(functions, bounds)
        path = staging / PROGRAM_NAME
        to_lower = methods_to_lower(functions, methods)
        lowered = lower(
            to_lower,
            progress=announce,
            longest_sum=encoder.longest_sum,
            etrecord=settings.etrecord,
        )
        path.write_bytes(lowered)
        program = LoadedProgram(path, methods)
        announce(STAGES[5])
        corpus = _corpus(program, functions, source, documents, settings=settings)
        announce(STAGES[6])
        reference = Reference(
            model=eager.double(),
            layout=trainables.layout,
            readout=source.readout,
            logit_scale=settings.logit_scale,
            corpus=corpus,
        )
        shapes = gate_shapes(max_batch=settings.max_batch, max_length=settings.max_length)
        parity = check_parity(
            program,
            reference,
            texts=GateTexts(
                tokenizer_path=source.tokenizer_path,
                prompt=source.prompts.query,
                passages=[document.passage for document in documents],
            ),
            shapes=shapes,
            embed_length=bounds.embed_length,
            catalogues=_other_catalogues(trainables, width=source.width),
            vocabulary=source.vocabulary,
        )
        announce(STAGES[7])
        finished = FinishedExport(
            source=source,
            documents=documents,
            functions=functions,
            methods=methods,
            reference=reference,
            settings=settings,
        )
        write_files(staging, finished)
        fields = manifest_fields(finished) | {"parity": parity, "licences": licences}
        if weights == "int8":
            fields["program"] = pack_weights(staging, fields["program"], packed)
        return finish_bundle(staging, destination, fields)


def _prompts(source: ModelSource, settings: ExportSettings) -> Prompts:
    query, document = settings.query_prompt, settings.document_prompt
    return Prompts(
        query=source.prompts.query if query is None else query,
        document=source.prompts.document if document is None else document,
    )


def _bounds(settings: ExportSettings) -> Bounds:
    return Bounds(
        batch=settings.max_batch,
        length=settings.max_length,
        embed_length=max(settings.max_length, settings.document_length),
        documents=settings.max_documents,
    )


def _other_catalogues(trainables: Trainables, *, width: int) -> list[Tensor]:
    """The smallest and a larger one, where the program takes any.

    Of documents that are much alike: among two that are not, the right one's probability is
    nearly 1, and a gradient near zero is a difference that float32 has few digits of.
    """
    if not trainables.any_catalogue:
        return []
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, width, generator=generator)
    sizes = (MIN_DOCUMENTS, 2 * trainables.num_documents + 1)
    return [
        functional.normalize(common + 0.2 * torch.randn(size, width, generator=generator), dim=-1)
        for size in sizes
    ]


def _check_settings(settings: ExportSettings, source: ModelSource, *, num_documents: int) -> None:
    positions = source.max_positions
    for name, value, low, high in (
        ("--max-batch", settings.max_batch, 2, None),
        ("--max-length", settings.max_length, MIN_LENGTH + 1, positions),
        ("--document-length", settings.document_length, MIN_LENGTH + 1, positions),
    ):
        if value < low or (high is not None and value > high):
            upper = "" if high is None else f" and at most {high} ({source.name} has no more)"
            raise ExportError(f"{name}: expected at least {low}{upper}, got {value}.")
    if num_documents > settings.max_documents:
        raise ExportError(
            f"--max-documents: expected at least {num_documents}, the documents there are, got "
            f"{settings.max_documents}."
        )
    if settings.weights not in _CHANGES:
        raise ExportError(f"--weights: expected {' or '.join(_CHANGES)}, got {settings.weights!r}.")
    if settings.etrecord is not None and not settings.etrecord.parent.is_dir():
        raise ExportError(
            f"--etrecord: expected a file in a folder that is there, got {settings.etrecord}."
        )
    if not 0 < settings.logit_scale < float("inf"):
        raise ExportError(f"--logit-scale: expected a positive number, got {settings.logit_scale}.")


def _licences(
    source: ModelSource, documents_path: Path, settings: ExportSettings
) -> tuple[schema.Licence, ...]:
    licence = stated_licence("--model-licence", settings.licence) or source.licence
    if licence is None:
        raise ExportError(
            f"{source.folder}: the model card states no licence. Find out what it is and pass it "
            f"with --model-licence, or accept that with --model-licence {NOT_STATED}."
        )
    beside = documents_path.parent / "NOTICE"
    notices = settings.notices
    if not notices and beside.is_file():
        notices = (read_notice(beside),)
    of_documents = stated_licence("--documents-licence", settings.documents_licence)
    if of_documents is None and not notices:
        raise ExportError(
            f"{documents_path}: nothing states the documents' licence. Put a text that must go "
            "with them into a file NOTICE beside it, or pass --documents-licence (an SPDX "
            f"expression; {NOT_STATED} where there is none to state)."
        )
    model = schema.Licence(
        applies_to=f"{source.name} (weights in {PROGRAM_NAME}; tokenizer.json)",
        licence=licence,
        revision=source.revision,
        notice=f"{source.name}, licence {licence} as its model card states; "
        f"weights {_CHANGES[settings.weights]}, compiled into {PROGRAM_NAME}.",
    )
    return (model, *schema.licences_of_documents(notices, licence=of_documents))


_CHANGES = {"float32": "unchanged", "int8": "rounded to int8 per channel"}


def _corpus(
    program: LoadedProgram,
    functions: StepFunctions,
    source: ModelSource,
    documents: list[Document],
    *,
    settings: ExportSettings,
) -> dict[str, Tensor]:
    shapes = functions.trainables.frozen_shapes
    untrained = {"theta": torch.zeros(functions.trainables.layout.num_values)}
    if "adapter_down" in shapes:
        table: Any = functions.encoder.model.get_input_embeddings().weight  # a tensor or a module
        untrained["adapter_down"] = principal_directions(table, rank=shapes["adapter_down"][1])
    embeddings = embed_passages(
        program,
        load_tokenizer(source.tokenizer_path, max_length=settings.document_length),
        [source.prompts.document + document.passage for document in documents],
        untrained=untrained,
        max_batch=settings.max_batch,
    )
    frozen = {"documents": embeddings, **untrained}
    if "basis" in shapes:
        frozen["basis"] = principal_directions(embeddings, rank=shapes["basis"][1])
    return {name: frozen[name] for name in shapes}
