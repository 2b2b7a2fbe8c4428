"""What is trained: adapters before the blocks, heads after them, and the presets of both."""

from carpool_export.trainables.presets import (
    DEFAULT_SCALES,
    PRESETS,
    AdapterKind,
    HeadKind,
    Kinds,
    Trainables,
    build_trainables,
    preset_kinds,
    preset_name,
)

__all__ = [
    "DEFAULT_SCALES",
    "PRESETS",
    "AdapterKind",
    "HeadKind",
    "Kinds",
    "Trainables",
    "build_trainables",
    "preset_kinds",
    "preset_name",
]
