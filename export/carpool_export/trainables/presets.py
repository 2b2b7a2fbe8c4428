"""Which adapter and head a bundle has, and the scale of each segment of theta."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from carpool.errors import ExportError
from carpool.schema import nearest
from carpool.theta import Layout, Segment
from carpool_export.trainables.adapters import (
    Adapter,
    LinearAdapter,
    LowRankAdapter,
    NoAdapter,
    ScaleBiasAdapter,
)
from carpool_export.trainables.heads import CoreHead, Head, MapHead, NoHead, RowsHead

AdapterKind = Literal["scale-bias", "linear", "low-rank", "none"]
HeadKind = Literal["core", "rows", "map", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    """What is trained.

    Attributes:
        adapter: before the blocks.
        head: after them.
        document_bias: whether each document has a trained bias on its logit.
        adapter_rank: of a low-rank adapter.
        head_rank: most directions of the documents that a core head maps within.
    """

    adapter: AdapterKind
    head: HeadKind
    document_bias: bool
    adapter_rank: int = 8
    head_rank: int = 128


PRESETS: dict[str, Kinds] = {
    "small": Kinds(adapter="scale-bias", head="core", document_bias=True),
    "paper": Kinds(adapter="linear", head="rows", document_bias=False),
}

DEFAULT_SCALES: dict[str, float] = {
    # Parameter units per unit of theta. A segment's own learning rate is the common one times
    # its scale squared; its weight in the joint clip is its scale.
    "adapter.scale": 0.2,
    "adapter.bias": 0.2,
    "adapter.weight": 0.2,
    "adapter.down": 0.2,
    "adapter.up": 0.2,
    "head.core": 1.0,
    "head.rows": 1.0,
    "head.map": 1.0,
    "head.bias": 1.7,
}

BIAS = "head.bias"


def preset_kinds(preset: str) -> Kinds:
    """A preset's kinds.

    Raises:
        ExportError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ExportError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    return PRESETS[preset]


def preset_name(kinds: Kinds) -> str:
    """The preset with these kinds, or ``"custom"``."""
    return next((name for name, preset in PRESETS.items() if preset == kinds), "custom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainables:
    """Adapter, head, whether there is a document bias, and theta's layout over all of them."""

    adapter: Adapter
    head: Head
    document_bias: bool
    layout: Layout

    @property
    def num_documents(self) -> int:
        """C of the catalogue that it was made for."""
        return self.head.frozen_shapes["documents"][0]

    @property
    def any_catalogue(self) -> bool:
        """Whether the number of documents is dynamic."""
        return self.head.any_catalogue

    @property
    def values_per_document(self) -> int:
        """How many of theta's values, its last ones, each document of any catalogue has."""
        return int(self.any_catalogue and self.document_bias)

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """The program's frozen inputs by name, in the order of the call."""
        return self.head.frozen_shapes | self.adapter.frozen_shapes


def build_trainables(
    kinds: Kinds,
    *,
    width: int,
    token_width: int | None = None,
    num_documents: int,
    logit_scale: float,
    scales: Mapping[str, float],
) -> Trainables:
    """The adapter and head for this model and catalogue.

    Args:
        kinds: what is trained.
        width: the pooled embedding's dimension, D.
        token_width: a token embedding's dimension, where it is another.
        num_documents: N.
        logit_scale: logits per unit of cosine.
        scales: by segment name; replaces the default where given.

    Raises:
        ExportError: an unknown kind, nothing to train, a rank out of range, a scale for a segment
            that there is not or that is not positive, or too few documents to train a retriever
            for.
    """
    if num_documents < 2:  # noqa: PLR2004  the smallest choice there is
        raise ExportError(f"expected at least 2 documents to choose from, got {num_documents}.")
    token_width = width if token_width is None else token_width
    _check(kinds, width=token_width)
    adapters: dict[AdapterKind, Adapter] = {
        "scale-bias": ScaleBiasAdapter(width=token_width),
        "linear": LinearAdapter(width=token_width),
        "low-rank": LowRankAdapter(width=token_width, rank=kinds.adapter_rank),
        "none": NoAdapter(),
    }
    sizes = {"width": width, "num_documents": num_documents}
    heads: dict[HeadKind, Head] = {
        "core": CoreHead(
            **sizes, rank=min(kinds.head_rank, width, num_documents), logit_scale=logit_scale
        ),
        "rows": RowsHead(**sizes, logit_scale=logit_scale),
        "map": MapHead(**sizes, logit_scale=logit_scale),
        "none": NoHead(**sizes, logit_scale=logit_scale),
    }
    adapter, head = adapters[kinds.adapter], heads[kinds.head]
    head_shapes = dict(head.shapes)
    if kinds.document_bias:
        head_shapes[BIAS] = (num_documents,)
    chosen = {name: DEFAULT_SCALES[name] for name in (*adapter.shapes, *head_shapes)}
    for name, scale in scales.items():
        if name not in chosen:
            raise ExportError(f"there is no segment {name!r} to scale{nearest(name, chosen)}")
        if not 0 < scale < float("inf"):
            raise ExportError(f"scale of {name}: expected a positive number, got {scale}.")
        chosen[name] = scale
    segments = [
        Segment(name=name, group="adapter", shape=shape, scale=chosen[name])
        for name, shape in adapter.shapes.items()
    ]
    segments += [
        Segment(name=name, group="head", shape=shape, scale=chosen[name])
        for name, shape in head_shapes.items()
    ]
    return Trainables(
        adapter=adapter,
        head=head,
        document_bias=kinds.document_bias,
        layout=Layout(segments=tuple(segments)),
    )


def _check(kinds: Kinds, *, width: int) -> None:
    for name, kind, known in (
        ("--adapter", kinds.adapter, get_args(AdapterKind)),
        ("--head", kinds.head, get_args(HeadKind)),
    ):
        if kind not in known:
            raise ExportError(f"{name}: unknown kind {kind!r}{nearest(kind, known)}")
    if kinds.adapter == "none" and kinds.head == "none" and not kinds.document_bias:
        raise ExportError(
            "expected something to train, got adapter none, head none and no document bias."
        )
    if not 1 <= kinds.adapter_rank <= width and kinds.adapter == "low-rank":
        raise ExportError(
            f"--adapter-rank: expected 1 to {width}, the embedding's dimension, got "
            f"{kinds.adapter_rank}."
        )
    if kinds.head_rank < 1:
        raise ExportError(f"--head-rank: expected at least 1, got {kinds.head_rank}.")
