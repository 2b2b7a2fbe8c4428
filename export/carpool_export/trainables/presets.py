"""The presets: which adapter and head, and the scale of each segment of theta."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from carpool.errors import ExportError
from carpool.schema import nearest
from carpool.theta import Layout, Segment
from carpool_export.trainables.adapters import Adapter, LinearAdapter, ScaleBiasAdapter
from carpool_export.trainables.heads import CoreHead, Head, RowsHead

Preset = Literal["small", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

MAX_RANK = 128
"""Directions of the documents that the core head maps within, where there are that many."""

DEFAULT_SCALES: dict[Preset, dict[str, float]] = {
    # Parameter units per unit of theta. A segment's own learning rate is the common one times
    # its scale squared; its weight in the joint clip is its scale.
    "small": {"adapter.scale": 0.2, "adapter.bias": 0.2, "head.core": 1.0, "head.bias": 1.7},
    "paper": {"adapter.weight": 0.2, "head.rows": 1.0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainables:
    """Adapter and head, and theta's layout over both."""

    adapter: Adapter
    head: Head
    layout: Layout


def build_trainables(
    preset: str,
    *,
    width: int,
    num_documents: int,
    logit_scale: float,
    scales: Mapping[str, float],
) -> Trainables:
    """The adapter and head of a preset for this model and catalogue.

    Args:
        preset: one of ``PRESETS``.
        width: the embedding's dimension, D.
        num_documents: N.
        logit_scale: logits per unit of cosine.
        scales: by segment name; replaces the preset's own where given.

    Raises:
        ExportError: an unknown preset, a scale for a segment that the preset does not have or
            that is not positive, or too few documents to train a retriever for.
    """
    if preset not in PRESETS:
        raise ExportError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    if num_documents < 2:  # noqa: PLR2004  the smallest choice there is
        raise ExportError(f"expected at least 2 documents to choose from, got {num_documents}.")
    adapter: Adapter
    head: Head
    if preset == "small":
        adapter = ScaleBiasAdapter(width=width)
        head = CoreHead(
            width=width,
            num_documents=num_documents,
            rank=min(MAX_RANK, width, num_documents),
            logit_scale=logit_scale,
        )
    else:
        adapter = LinearAdapter(width=width)
        head = RowsHead(width=width, num_documents=num_documents, logit_scale=logit_scale)
    chosen = dict(DEFAULT_SCALES[preset])
    for name, scale in scales.items():
        if name not in chosen:
            raise ExportError(
                f"preset {preset!r} has no segment {name!r} to scale{nearest(name, chosen)}"
            )
        if not 0 < scale < float("inf"):
            raise ExportError(f"scale of {name}: expected a positive number, got {scale}.")
        chosen[name] = scale
    adapter_segments = tuple(
        Segment(name=name, group="adapter", shape=shape, scale=chosen[name])
        for name, shape in adapter.shapes.items()
    )
    head_segments = tuple(
        Segment(name=name, group="head", shape=shape, scale=chosen[name])
        for name, shape in head.shapes.items()
    )
    return Trainables(
        adapter=adapter, head=head, layout=Layout(segments=adapter_segments + head_segments)
    )
