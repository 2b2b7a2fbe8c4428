"""What is trained: adapters before the blocks, heads after them, and the presets of both."""

from carpool_export.trainables.adapters import Adapter, LinearAdapter, ScaleBiasAdapter
from carpool_export.trainables.heads import CoreHead, Head, RowsHead
from carpool_export.trainables.presets import (
    DEFAULT_SCALES,
    PRESETS,
    Preset,
    Trainables,
    build_trainables,
)

__all__ = [
    "DEFAULT_SCALES",
    "PRESETS",
    "Adapter",
    "CoreHead",
    "Head",
    "LinearAdapter",
    "Preset",
    "RowsHead",
    "ScaleBiasAdapter",
    "Trainables",
    "build_trainables",
]
