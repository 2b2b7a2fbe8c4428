"""Sums as matrix products, because those are what the mobile kernels have."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PARTS = 16
"""Columns that a product's kernel computes at once, whether they are asked for or not."""


def row_sum(values: Tensor, *, scale: float = 1.0) -> Tensor:
    """``scale`` times the sum over the last dimension, which stays with size 1.

    Long rows in two steps, every sixteenth value and then the sixteen sums: kernels add one
    value after the other, and the error of a sum grows with how many.
    """
    length = values.shape[-1]
    if type(length) is not int:  # known only when the program runs
        return values.matmul(torch.full((length, 1), scale, dtype=values.dtype))
    if length < _PARTS * _PARTS:
        return values.matmul(_ones(length, scale).to(values.dtype))
    return row_sum(values.matmul(_every_sixteenth(length).to(values.dtype)), scale=scale)


@functools.cache
def _ones(length: int, scale: float) -> Tensor:
    return constant(np.full((length, 1), scale, dtype=np.float32))


@functools.cache
def _every_sixteenth(length: int) -> Tensor:
    eye = np.eye(_PARTS, dtype=np.float32)
    return constant(np.tile(eye, (-(-length // _PARTS), 1))[:length].copy())


def constant(array: NDArray[np.float32]) -> Tensor:
    """A factor of a product, also while a function is traced."""
    # here, because what lowers uses these sums itself
    from carpool_export.lowering.private.tracing import constant as make  # noqa: PLC0415

    return make(array)
