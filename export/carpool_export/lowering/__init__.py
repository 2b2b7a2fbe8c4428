"""From a Python function to a ``.pte``: trace, rewrite, partition, lower."""

from carpool_export.lowering.lower import MethodToLower, lower, lower_gradient_program

__all__ = ["MethodToLower", "lower", "lower_gradient_program"]
