"""Sums as matrix products, because those are what the mobile kernels have."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTS = 16
"""Columns that a product's kernel computes at once, whether they are asked for or not."""


def row_sum(values: Tensor, *, scale: float = 1.0) -> Tensor:
    """``scale`` times the sum over the last dimension, which stays with size 1.

    Long rows in two steps, every sixteenth value and then the sixteen sums: kernels add one
    value after the other, and the error of a sum grows with how many.
    """
    length = values.shape[-1]
    if not isinstance(length, int) or length < _PARTS * _PARTS:
        ones = torch.full((1, length), scale, dtype=values.dtype)
        return values.matmul(ones.t())
    every = torch.eye(_PARTS, dtype=values.dtype).repeat(1, -(-length // _PARTS))[:, :length]
    return row_sum(values.matmul(every.t()), scale=scale)
