"""The frozen model: the library's own code, with attention and masks that can be lowered."""

from carpool_export.model.attention import PACKED_ATTENTION
from carpool_export.model.encoder import Dense, Encoder, Pooling, Readout
from carpool_export.model.loading import EAGER_ATTENTION, build_encoder, load_model
from carpool_export.model.packing import Packing

__all__ = [
    "EAGER_ATTENTION",
    "PACKED_ATTENTION",
    "Dense",
    "Encoder",
    "Packing",
    "Pooling",
    "Readout",
    "build_encoder",
    "load_model",
]
