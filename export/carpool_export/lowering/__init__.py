"""From a Python function to a ``.pte``: trace, rewrite, partition, lower."""

from carpool_export.lowering.lower import MethodToLower, lower

__all__ = ["MethodToLower", "lower"]
