"""The bundle's manifest: what a device must know before it runs anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from carpool.licences import NOT_STATED, spdx_expression
from carpool.schema import Model, Sha256, canonical_id
from carpool.theta import Layout

SCHEMA_VERSION: Literal[4] = 4

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A plain name inside the bundle's folder: no directory, no leading dot."""


def _refuse_other_spelling(licence: str) -> str:
    if licence != (canonical := spdx_expression(licence)):
        raise ValueError(f"expected {canonical!r}, got {licence!r}")
    return licence


class FileEntry(Model):
    """A file's size in bytes and the SHA-256 of its content."""

    bytes: PositiveInt
    sha256: Sha256


class Range(Model):
    """Smallest and largest value, both included."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got {self.min} and {self.max}")
        return self


class RuntimeRange(Model):
    """Which ExecuTorch runtimes may run the program: ``at_least <= version < below``."""

    at_least: str
    below: str


Dimension = Literal["batch", "length", "tokens", "documents", "values"]
"""A size that a call chooses: rows, slots of a row, tokens of all rows together, documents, and
theta's length, which grows with the documents by ``Program.values_per_document``."""


FROZEN_INPUTS = ("documents", "basis", "adapter_down")
"""What the corpus file may hold, in the order of the call."""


class TensorSpec(Model):
    """An input or output: its name, dtype, and shape, with a ``Dimension`` where it is dynamic."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[PositiveInt | Dimension, ...]


class Method(Model):
    """A method of the program.

    Attributes:
        bounds: of each dimension that its calls choose, except ``values``.
        inputs: in the order of the call.
        outputs: in the order in which they are returned.
    """

    bounds: dict[Dimension, Range]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @model_validator(mode="after")
    def _bounds_every_dimension(self) -> Self:
        used = {
            size
            for spec in (*self.inputs, *self.outputs)
            for size in spec.shape
            if isinstance(size, str)
        }
        if used - {"values"} != set(self.bounds):
            raise ValueError(
                f"expected bounds of {sorted(used - {'values'})}, got {sorted(self.bounds)}"
            )
        return self


class WeightSegment(Model):
    """A frozen matrix inside the program, row by row, shipped as int8 with a scale per channel.

    Attributes:
        offset: of its first byte in the program.
        rows: of the matrix.
        columns: likewise.
        scale_per: whether a channel is a row or a column.
    """

    offset: Annotated[int, Field(ge=0)]
    rows: PositiveInt
    columns: PositiveInt
    scale_per: Literal["row", "column"]

    @property
    def channels(self) -> int:
        """How many scales it has."""
        return self.rows if self.scale_per == "row" else self.columns

    @property
    def end(self) -> int:
        """The byte of the program after its last one."""
        return self.offset + 4 * self.rows * self.columns

    @property
    def packed_bytes(self) -> int:
        """What it takes in the shipped file."""
        return 4 * self.channels + self.rows * self.columns


class PackedWeights(Model):
    """The program as it is shipped where its weights are int8.

    The file is the program with each segment replaced, at its place, by its scales (float32,
    little-endian) and then its values (int8, row by row). A weight is value times scale in
    float32, which every processor rounds alike.

    Attributes:
        file: its name.
        program: size and SHA-256 of the program that it expands to.
        segments: in the order of the program; they do not overlap.
    """

    file: FileName
    program: FileEntry
    segments: tuple[WeightSegment, ...]

    @property
    def file_bytes(self) -> int:
        """The size that follows from the segments."""
        return self.program.bytes + sum(
            segment.packed_bytes - (segment.end - segment.offset) for segment in self.segments
        )

    @model_validator(mode="after")
    def _segments_are_inside_and_apart(self) -> Self:
        end = 0
        for segment in self.segments:
            if segment.offset < end:
                raise ValueError(f"expected a segment at {end} or later, got {segment.offset}")
            end = segment.end
        if end > self.program.bytes:
            raise ValueError(f"expected segments within {self.program.bytes} bytes, got {end}")
        return self


class Program(Model):
    """The ``.pte`` and how it may be called.

    Attributes:
        file: its name; not shipped where ``packed`` is.
        packed: what is shipped instead; None where the weights are float32.
        runtime: what may run it.
        values_per_document: how many of theta's values each document has of its own, where the
            number of documents is dynamic; they are theta's last ones, a document after the
            other.
        methods: ``gradients``, ``scores`` and ``embed``, by name.
    """

    file: FileName
    packed: PackedWeights | None
    runtime: RuntimeRange
    values_per_document: Annotated[int, Field(ge=0)]
    methods: dict[str, Method]

    @property
    def shipped_file(self) -> str:
        """The name of what is shipped: the program itself or its packed form."""
        return self.file if self.packed is None else self.packed.file

    @model_validator(mode="after")
    def _has_every_method(self) -> Self:
        if missing := sorted({"gradients", "scores", "embed"} - self.methods.keys()):
            raise ValueError(f"expected gradients, scores and embed, got no {missing}")
        for name, method in self.methods.items():
            if missing := sorted({"batch", "length"} - method.bounds.keys()):
                raise ValueError(f"{name}: expected bounds of batch and length, got no {missing}")
        return self


class SourceModel(Model):
    """The frozen model that went in.

    Attributes:
        name: as its publisher calls it.
        architecture: Hugging Face ``model_type``.
        hidden_size: d, the embedding's dimension.
        pooling: how token states become one embedding.
        normalize: whether the embedding is scaled to length 1.
        weights: float32 as they were published, or rounded to int8 per channel.
        weights_sha256: of the source's weight file.
    """

    name: str
    architecture: str
    hidden_size: PositiveInt
    pooling: Literal["mean", "cls", "last"]
    normalize: bool
    weights: Literal["float32", "int8"]
    weights_sha256: Sha256


class ScaleBiasAdapter(Model):
    """Soft embedding = (1 + scale) * embedding + bias, per embedding dimension."""

    kind: Literal["scale-bias"] = "scale-bias"


class LinearAdapter(Model):
    """Soft embedding = W embedding, W starting at the identity (the paper's matrix)."""

    kind: Literal["linear"] = "linear"


class LowRankAdapter(Model):
    """Soft embedding = embedding + up (down^T embedding), both d x R, up starting at zero.

    ``down`` starts at the frozen input ``adapter_down``; ``rank`` is R.
    """

    kind: Literal["low-rank"] = "low-rank"
    rank: PositiveInt


class NoAdapter(Model):
    """Soft embedding = embedding."""

    kind: Literal["none"] = "none"


class CoreHead(Model):
    """Score = <d, z + U M U^T z> + bias_d: documents fixed, M within their directions U.

    ``rank`` is R, the number of principal directions.
    """

    kind: Literal["core"] = "core"
    rank: PositiveInt
    document_bias: bool


class RowsHead(Model):
    """Score = <w_d, z>: a trainable row per document, starting at its embedding."""

    kind: Literal["rows"] = "rows"
    document_bias: bool


class MapHead(Model):
    """Score = <d, z + M z> + bias_d: documents fixed, M d x d, starting at zero."""

    kind: Literal["map"] = "map"
    document_bias: bool


class NoHead(Model):
    """Score = <d, z> + bias_d."""

    kind: Literal["none"] = "none"
    document_bias: bool


Adapter = Annotated[
    ScaleBiasAdapter | LinearAdapter | LowRankAdapter | NoAdapter, Field(discriminator="kind")
]
Head = Annotated[CoreHead | RowsHead | MapHead | NoHead, Field(discriminator="kind")]


class Documents(Model):
    """The catalogue.

    Attributes:
        file: JSON lines ``{"id", "title", "text"}`` in the order of the scores.
        count: N.
        embedding_length: tokens of "title. text" that the document's embedding was made from.
        prompt: what was put before it.
        corpus_file: safetensors with the program's frozen inputs: ``documents`` (float32, N x d),
            ``basis`` (float32, d x R; core head) and ``adapter_down`` (float32, a token
            embedding's dimension x R; low-rank adapter).
    """

    file: FileName
    count: PositiveInt
    embedding_length: PositiveInt
    prompt: str
    corpus_file: FileName


class Tokenizer(Model):
    """``tokenizer.json`` and what a device needs beside it.

    Attributes:
        file: Hugging Face ``tokenizer.json``; its own truncation and padding are ignored.
        kind: the model type inside; BPE is over bytes.
        query_prompt: put before every query.
        max_length: longer queries are cut to this many tokens, special ones included.
    """

    file: FileName
    kind: Literal["WordPiece", "BPE", "Unigram"]
    query_prompt: str
    max_length: PositiveInt


class Golden(Model):
    """One training step to replay, and how far its results may be off on this device.

    Attributes:
        file: safetensors: all inputs by name, the frozen ones included (a small catalogue of
            its own where the number of documents is dynamic), ``expected_loss``,
            ``expected_gradient``, ``expected_scores`` and ``expected_embed``; its metadata
            holds ``texts`` (a JSON list), whose packed tokens the query's inputs are.
        gradient_tolerance: largest absolute difference allowed, as a share of the largest
            expected gradient; likewise the others of the loss, of the largest score and of
            the largest value of an embedding.
    """

    file: FileName
    gradient_tolerance: PositiveFloat
    loss_tolerance: PositiveFloat
    scores_tolerance: PositiveFloat
    embed_tolerance: PositiveFloat


class ParityCase(Model):
    """Where the exporter's gate compared gradients, and what it found.

    Attributes:
        batch: rows.
        length: tokens of the longest row.
        documents: in the catalogue.
        gradient_error: plain or clipped, the larger.
        eager_float32_error: eager PyTorch's own in float32, in the same place, where the program's
            was above the gate.
    """

    batch: PositiveInt
    length: PositiveInt
    documents: PositiveInt
    gradient_error: Annotated[float, Field(ge=0)]
    eager_float32_error: PositiveFloat | None


class Parity(Model):
    """What the exporter's gate measured: the largest errors, and the gradient's case by case.

    Errors are shares of the largest eager value; the loss's of 1, where eager is less; the
    trajectory's, of theta after ``trajectory_steps`` training steps from zero, of the longest way
    that one of its values went.
    """

    gate: PositiveFloat
    gradient_error: Annotated[float, Field(ge=0)]
    scores_error: Annotated[float, Field(ge=0)]
    loss_error: Annotated[float, Field(ge=0)]
    embed_error: Annotated[float, Field(ge=0)]
    trajectory_error: Annotated[float, Field(ge=0)]
    trajectory_steps: PositiveInt
    cases: tuple[ParityCase, ...]


class Licence(Model):
    """Whose terms a part of the bundle stands under, and the notice to reproduce.

    Attributes:
        applies_to: which files, in words.
        licence: an SPDX expression; ``LicenseRef-NAME`` for what SPDX does not list,
            ``NOASSERTION`` where nobody states it.
        revision: of what went in: a hub commit, or a package and its version; None where it has
            none.
        notice: to reproduce with every copy.
    """

    applies_to: str
    licence: Annotated[str, AfterValidator(_refuse_other_spelling)]
    revision: str | None
    notice: str


def licences_of_documents(
    notices: Sequence[str], *, licence: str | None = None
) -> tuple[Licence, ...]:
    """An entry for each text that must go with the catalogue's files, or one without a text.

    Args:
        notices: the texts; several where documents come from several places.
        licence: an SPDX expression, if somebody states one.
    """
    stated = licence or ("LicenseRef-notice" if notices else NOT_STATED)
    return tuple(
        Licence(
            applies_to="documents.jsonl, corpus.safetensors",
            licence=stated,
            revision=None,
            notice=notice,
        )
        for notice in notices or ("",)
    )


class Signature(Model):
    """Over the bundle's id. Bundles of this schema may be unsigned."""

    algorithm: Literal["Ed25519"]
    key_id: str
    value: str


class Manifest(Model):
    """Everything about a bundle. Its id is the hash of all this but the signature."""

    schema_version: Literal[4] = SCHEMA_VERSION
    carpool_version: str
    preset: str
    model: SourceModel
    adapter: Adapter
    head: Head
    logit_scale: PositiveFloat
    layout_id: Sha256
    layout: Layout
    theta_file: FileName
    documents: Documents
    program: Program
    tokenizer: Tokenizer
    golden: Golden
    parity: Parity
    licences: tuple[Licence, ...]
    files: dict[FileName, FileEntry]
    signature: Signature | None

    @model_validator(mode="after")
    def _vouches_for_every_file(self) -> Self:
        used = {
            self.theta_file,
            self.documents.file,
            self.documents.corpus_file,
            self.program.shipped_file,
            self.tokenizer.file,
            self.golden.file,
        }
        if missing := sorted(used - self.files.keys()):
            raise ValueError(f"expected files to list every file in use, got no {missing}")
        packed = self.program.packed
        if packed is not None:
            found = self.files[packed.file].bytes
            if found != packed.file_bytes:
                raise ValueError(
                    f"expected {packed.file} to have the {packed.file_bytes} bytes that its "
                    f"segments add up to, got {found}"
                )
            if self.program.file in self.files:
                raise ValueError(f"expected {self.program.file} or {packed.file}, got both")
        return self

    @property
    def id(self) -> str:
        """The bundle's id: SHA-256 of the canonical manifest without its signature."""
        return canonical_id(self.model_dump(mode="json", exclude={"signature"}))
