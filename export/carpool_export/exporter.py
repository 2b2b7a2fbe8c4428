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
from torch.export import Dim
from transformers import PreTrainedModel

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle import manifest as schema
from carpool.data.corpus import Document, read_documents, write_lines
from carpool.errors import ExportError
from carpool.theta import write_theta, zero_theta
from carpool_export import golden
from carpool_export.corpus import embed_passages, load_tokenizer, principal_directions
from carpool_export.lowering import MethodToLower, lower
from carpool_export.model import Encoder, load_model
from carpool_export.parity import GRADIENT_GATE, check_parity, gate_shapes
from carpool_export.program import StepFunctions
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.source import ModelSource, open_source
from carpool_export.trainables import (
    PRESETS,
    Kinds,
    Trainables,
    build_trainables,
    preset_name,
)

MIN_LENGTH = 2
"""Fewest tokens in a batch: torch.export takes 1 for a constant."""

RUNTIME = schema.RuntimeRange(at_least="1.5.0", below="1.6.0")

STAGES = (
    "reading the model",
    "embedding the documents",
    "tracing gradients",
    "tracing scores",
    "lowering gradients and scores",
    "comparing with eager PyTorch",
    "writing",
)
"""What ``export_bundle`` announces, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What may be chosen.

    Attributes:
        kinds: what is trained.
        logit_scale: logits per unit of cosine.
        document_length: tokens of a document that its embedding is made from.
        max_batch: most rows in a call.
        max_length: most tokens in a row; the program's memory is planned for it.
        scales: by segment of theta, instead of the preset's.
        licence: of the model, instead of what its model card states.
        notices: texts that must go with the documents; ``NOTICE`` beside their file if empty.
    """

    kinds: Kinds = PRESETS["small"]
    logit_scale: float = 20.0
    document_length: int = 128
    max_batch: int = 8
    max_length: int = 64
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
    source = open_source(model)
    documents = read_documents(documents_path)
    _check_settings(settings, source)
    licences = _licences(source, documents_path, settings)
    trainables = build_trainables(
        settings.kinds,
        width=source.hidden_size,
        num_documents=len(documents),
        logit_scale=settings.logit_scale,
        scales=settings.scales,
    )
    with staging_folder(destination) as staging:
        announce(STAGES[0])
        eager = load_model(source.folder, attention="eager")
        announce(STAGES[1])
        corpus = _corpus(eager, source, documents, trainables=trainables, settings=settings)
        reference = Reference(
            model=eager.double(),
            layout=trainables.layout,
            logit_scale=settings.logit_scale,
            corpus=corpus,
        )
        functions = StepFunctions(
            encoder=Encoder(load_model(source.folder, attention="carpool_bmm")),
            trainables=trainables,
        )
        program = staging / "program.pte"
        program.write_bytes(lower(methods_to_lower(functions, settings), progress=announce))
        announce(STAGES[5])
        shapes = gate_shapes(max_batch=settings.max_batch, max_length=settings.max_length)
        measured = check_parity(
            LoadedProgram(program, ("gradients", "scores")),
            reference,
            shapes=shapes,
            vocabulary=source.vocabulary,
        )
        announce(STAGES[6])
        _write_files(staging, source, documents, reference, settings)
        parity = schema.Parity(
            gate=GRADIENT_GATE,
            gradient_error=measured.gradient,
            scores_error=measured.scores,
            loss_error=measured.loss,
            shapes=tuple(shapes),
        )
        fields = _manifest_fields(source, documents, trainables, settings)
        return finish_bundle(
            staging, destination, fields | {"parity": parity, "licences": licences}
        )


def methods_to_lower(
    functions: StepFunctions, settings: ExportSettings
) -> dict[str, MethodToLower]:
    """The program's methods with example inputs of sizes that nothing else here has."""
    batch = Dim("batch", min=1, max=settings.max_batch)
    length = Dim("length", min=MIN_LENGTH, max=settings.max_length)
    frozen_shapes = functions.trainables.frozen_shapes.values()
    taken = {size for shape in frozen_shapes for size in shape}
    rows = _example_size(settings.max_batch, taken)
    tokens = _example_size(settings.max_length, taken | {rows})
    frozen = (
        torch.zeros(functions.trainables.layout.num_values),
        *(torch.zeros(shape) for shape in frozen_shapes),
    )
    # Tensors of their own: the tracer takes one that is given twice for one input.
    query = tuple(torch.ones(rows, tokens, dtype=torch.int64) for _ in range(2))
    query_dims: tuple[dict[int, Any] | None, ...] = ({0: batch, 1: length}, {0: batch, 1: length})
    return {
        "gradients": MethodToLower(
            function=functions.gradients,
            example_inputs=(
                *frozen,
                *query,
                torch.zeros(rows, dtype=torch.int64),
                torch.ones(rows),
                torch.ones(1),
            ),
            dynamic_shapes=(
                *(None for _ in frozen),
                *query_dims,
                {0: batch},
                {0: batch},
                None,
            ),
        ),
        "scores": MethodToLower(
            function=functions.scores,
            example_inputs=(*frozen, *query),
            dynamic_shapes=(*(None for _ in frozen), *query_dims),
        ),
    }


def read_notice(path: Path) -> str:
    """A notice's text.

    Raises:
        ExportError: it is no text file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"notice {path}: expected a text file, got: {error}") from error


def _example_size(bound: int, taken: set[int]) -> int:
    """A size up to the bound that the tracer cannot mistake for another: equal ones are tied."""
    for size in range(bound, 1, -1):
        if size not in taken:
            return size
    raise ExportError(
        f"no size between 2 and {bound} differs from the model's own ({sorted(taken)}); "
        "expected a larger --max-batch or --max-length."
    )


def _check_settings(settings: ExportSettings, source: ModelSource) -> None:
    positions = source.max_positions
    for name, value, low, high in (
        ("--max-batch", settings.max_batch, 2, None),
        ("--max-length", settings.max_length, MIN_LENGTH + 1, positions),
        ("--document-length", settings.document_length, MIN_LENGTH + 1, positions),
    ):
        if value < low or (high is not None and value > high):
            upper = "" if high is None else f" and at most {high} ({source.name} has no more)"
            raise ExportError(f"{name}: expected at least {low}{upper}, got {value}.")
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
    eager: PreTrainedModel,
    source: ModelSource,
    documents: list[Document],
    *,
    trainables: Trainables,
    settings: ExportSettings,
) -> dict[str, Tensor]:
    embeddings = embed_passages(
        eager,
        load_tokenizer(source.tokenizer_path, max_length=settings.document_length),
        [document.passage for document in documents],
        pad_id=source.pad_id,
    )
    frozen = {"documents": embeddings}
    shapes = trainables.frozen_shapes
    if "basis" in shapes:
        frozen["basis"] = principal_directions(embeddings, rank=shapes["basis"][1])
    if "adapter_down" in shapes:
        table: Any = eager.get_input_embeddings().weight  # typed as a tensor or a module
        frozen["adapter_down"] = principal_directions(table, rank=shapes["adapter_down"][1])
    return frozen


def _write_files(
    staging: Path,
    source: ModelSource,
    documents: list[Document],
    reference: Reference,
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
        pad_id=source.pad_id,
        max_batch=settings.max_batch,
        min_length=MIN_LENGTH,
    )
    save_file(
        step.tensors,
        staging / "golden.safetensors",
        metadata={"texts": json.dumps(step.texts, ensure_ascii=False)},
    )


def _manifest_fields(
    source: ModelSource,
    documents: list[Document],
    trainables: Trainables,
    settings: ExportSettings,
) -> dict[str, Any]:
    return {
        "carpool_version": importlib.metadata.version("carpool"),
        "preset": preset_name(settings.kinds),
        "model": schema.SourceModel(
            name=source.name,
            architecture=source.architecture,
            hidden_size=source.hidden_size,
            pooling="mean",
            normalize=True,
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
            corpus_file="corpus.safetensors",
        ),
        "program": _program_record(trainables, len(documents), settings),
        "tokenizer": schema.Tokenizer(
            file="tokenizer.json",
            kind="WordPiece",
            max_length=settings.max_length,
            pad_id=source.pad_id,
        ),
        "golden": schema.Golden(
            file="golden.safetensors",
            gradient_tolerance=golden.GRADIENT_TOLERANCE,
            loss_tolerance=golden.LOSS_TOLERANCE,
            scores_tolerance=golden.SCORES_TOLERANCE,
        ),
    }


def _program_record(
    trainables: Trainables, num_documents: int, settings: ExportSettings
) -> schema.Program:
    theta = schema.TensorSpec(name="theta", dtype="float32", shape=(trainables.layout.num_values,))
    common = (
        theta,
        *(
            schema.TensorSpec(name=name, dtype="float32", shape=shape)
            for name, shape in trainables.frozen_shapes.items()
        ),
        schema.TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
        schema.TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length")),
    )
    gradients = schema.Method(
        inputs=(
            *common,
            schema.TensorSpec(name="labels", dtype="int64", shape=("batch",)),
            schema.TensorSpec(name="example_weights", dtype="float32", shape=("batch",)),
            schema.TensorSpec(name="l2_clip_norm", dtype="float32", shape=(1,)),
        ),
        outputs=(
            schema.TensorSpec(name="loss", dtype="float32", shape=(1,)),
            theta.model_copy(update={"name": "gradient"}),
        ),
    )
    scores = schema.Method(
        inputs=common,
        outputs=(
            schema.TensorSpec(name="scores", dtype="float32", shape=("batch", num_documents)),
        ),
    )
    return schema.Program(
        file="program.pte",
        runtime=RUNTIME,
        batch=schema.Range(min=1, max=settings.max_batch),
        length=schema.Range(min=MIN_LENGTH, max=settings.max_length),
        methods={"gradients": gradients, "scores": scores},
    )
