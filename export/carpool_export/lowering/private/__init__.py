"""Every use of a name that torch or ExecuTorch does not promise to keep.

Tried on torch 2.13.0 and ExecuTorch 1.5.1. ``NAMES`` lists them, and a test fails when one
moves.
"""

from carpool_export.lowering.private.names import NAMES
from carpool_export.lowering.private.speed import fast_lowering
from carpool_export.lowering.private.tracing import edge_config, trace
from carpool_export.lowering.private.xnnpack import partitioner

__all__ = ["NAMES", "edge_config", "fast_lowering", "partitioner", "trace"]
