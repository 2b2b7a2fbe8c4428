"""A model and a documents file become a bundle, or nothing is written at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle import manifest as schema
from carpool.data.corpus import Document, read_documents, write_lines
from carpool.errors import ExportError
from carpool.theta import write_theta, zero_theta
from carpool_export import golden
from carpool_export.corpus import embed_passages, load_tokenizer, principal_directions
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
    Pooling,
    build_encoder,
    load_model,
)
from carpool_export.parity import GRADIENT_GATE, check_parity, gate_shapes
from carpool_export.program import StepFunctions
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.source import ModelSource, open_source
from carpool_export.source.chain import Prompts
from carpool_export.trainables import (
    PRESETS,
    Kinds,
    Trainables,
    build_trainables,
    preset_name,
)

RUNTIME = schema.RuntimeRange(at_least="1.5.0", below="1.6.0")

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
        licence: of the model, instead of what its model card states.
        notices: texts that must go with the documents; ``NOTICE`` beside their file if empty.
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
    licence: str | None = None
    notices: tuple[str, ...] = ()


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
        eager = load_model(source.folder, attention=EAGER_ATTENTION)
        packed = load_model(source.folder, attention=PACKED_ATTENTION)
        encoder = build_encoder(packed, eager, source.readout)
        functions = StepFunctions(encoder=encoder, trainables=trainables)
        methods = describe_methods(functions, _bounds(settings))
        path = staging / "program.pte"
        path.write_bytes(lower(methods_to_lower(functions, methods), progress=announce))
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
        measured = check_parity(
            program,
            reference,
            shapes=shapes,
            embed_length=_bounds(settings).embed_length,
            catalogues=_other_catalogues(trainables, width=source.width),
            vocabulary=source.vocabulary,
        )
        announce(STAGES[7])
        _write_files(staging, source, documents, reference, trainables, settings)
        parity = schema.Parity(
            gate=GRADIENT_GATE,
            gradient_error=measured.gradient,
            scores_error=measured.scores,
            loss_error=measured.loss,
            embed_error=measured.embed,
            shapes=tuple(shapes),
        )
        fields = _manifest_fields(source, documents, functions, methods, settings)
        return finish_bundle(
            staging, destination, fields | {"parity": parity, "licences": licences}
        )


def read_notice(path: Path) -> str:
    """A notice's text.

    Raises:
        ExportError: it is no text file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"notice {path}: expected a text file, got: {error}") from error


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
    """The smallest and a larger one, where the program takes any."""
    if not trainables.any_catalogue:
        return []
    generator = torch.Generator().manual_seed(0)
    sizes = (MIN_DOCUMENTS, 2 * trainables.num_documents + 1)
    return [
        torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=-1)
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
    if not 0 < settings.logit_scale < float("inf"):
        raise ExportError(f"--logit-scale: expected a positive number, got {settings.logit_scale}.")


def _licences(
    source: ModelSource, documents_path: Path, settings: ExportSettings
) -> tuple[schema.Licence, ...]:
    licence = settings.licence or source.licence
    if licence is None:
        raise ExportError(
            f"{source.folder}: the model card states no licence. "
            "Find out what it is and pass it with --model-licence."
        )
    beside = documents_path.parent / "NOTICE"
    notices = settings.notices
    if not notices and beside.is_file():
        notices = (read_notice(beside),)
    model = schema.Licence(
        applies_to=f"{source.name} (weights in program.pte; tokenizer.json)",
        licence=licence,
        notice=f"{source.name}, licence {licence} as its model card states; "
        f"weights unchanged, compiled into program.pte.",
    )
    return (
        model,
        *(
            schema.Licence(
                applies_to="documents.jsonl, corpus.safetensors", licence="see notice", notice=text
            )
            for text in notices
        ),
    )


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


def _write_files(
    staging: Path,
    source: ModelSource,
    documents: list[Document],
    reference: Reference,
    trainables: Trainables,
    settings: ExportSettings,
) -> None:
    shutil.copyfile(source.tokenizer_path, staging / "tokenizer.json")
    write_lines(staging / "documents.jsonl", documents)
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
        documents,
        prompt=source.prompts.query,
        any_catalogue=trainables.any_catalogue,
        max_batch=settings.max_batch,
    )
    save_file(
        step.tensors,
        staging / "golden.safetensors",
        metadata={"texts": json.dumps(step.texts, ensure_ascii=False)},
    )


def _manifest_fields(
    source: ModelSource,
    documents: list[Document],
    functions: StepFunctions,
    methods: dict[str, schema.Method],
    settings: ExportSettings,
) -> dict[str, Any]:
    trainables = functions.trainables
    return {
        "carpool_version": importlib.metadata.version("carpool"),
        "preset": preset_name(settings.kinds),
        "model": schema.SourceModel(
            name=source.name,
            architecture=source.architecture,
            hidden_size=source.width,
            pooling=source.readout.pooling,
            normalize=source.readout.normalize,
            weights_sha256=source.weights_sha256(),
        ),
        "adapter": trainables.adapter.describe(),
        "head": trainables.head.describe(document_bias=trainables.document_bias),
        "logit_scale": settings.logit_scale,
        "layout": trainables.layout,
        "theta_file": "theta.safetensors",
        "documents": schema.Documents(
            file="documents.jsonl",
            count=len(documents),
            embedding_length=settings.document_length,
            prompt=source.prompts.document,
            corpus_file="corpus.safetensors",
        ),
        "program": schema.Program(
            file="program.pte",
            runtime=RUNTIME,
            values_per_document=trainables.values_per_document,
            methods=methods,
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
