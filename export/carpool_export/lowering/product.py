"""What XNNPACK's kernels do and ATen has no operator for, as operators of our own.

``product`` is a matrix product over the last two dimensions. ATen's own are narrower: ``bmm``
takes three dimensions and ``mm`` two, so every product in a model is wrapped in views, each of
which ends a partition where two sizes are known only at run time. ``matmul`` would be decomposed
into just those. ``part`` is one matrix of several.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("carpool::product", mutates_args=())
def product(left: Tensor, right: Tensor, transpose_right: bool) -> Tensor:  # noqa: FBT001  an operator's schema
    """``left @ right``, or ``left @ right^T`` over the last two dimensions of ``right``.

    Args:
        left: float32, shape ``(..., M, K)``.
        right: float32, ``(K, N)``, or ``(..., K, N)`` with the same leading sizes.
        transpose_right: the last two sizes of ``right`` are ``(N, K)``.
    """
    return torch.matmul(left, right.mT if transpose_right else right).contiguous()


@product.register_fake
def _(left: Tensor, right: Tensor, transpose_right: bool) -> Tensor:  # noqa: FBT001  an operator's schema
    return left.new_empty(*left.shape[:-1], right.shape[-2 if transpose_right else -1])


PRODUCT = torch.ops.carpool.product.default
"""As it stands in a graph."""


@torch.library.custom_op("carpool::part", mutates_args=())
def part(matrices: Tensor, place: int) -> Tensor:
    """``matrices[place : place + 1]``.

    ATen's ``slice`` is refused by ExecuTorch's partitioner where another size is known only at
    run time; XNNPACK itself takes it.

    Args:
        matrices: float32, shape ``(P, M, N)``.
        place: 0 to P - 1.
    """
    return matrices[place : place + 1].clone()


@part.register_fake
def _(matrices: Tensor, place: int) -> Tensor:  # noqa: ARG001  an operator's schema
    return matrices.new_empty(1, *matrices.shape[1:])


PART = torch.ops.carpool.part.default
"""As it stands in a graph."""
