"""Operators that XNNPACK lacks, written in ones that it has.

Most become matrix products with a row of ones: XNNPACK's reductions cover few shapes, its
products all that occur here. Each function has the signature of the ATen operator it replaces;
what a function does not cover it leaves as it is, and the gate at the end compares the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from carpool_export.trainables.per_example import row_sum

aten = torch.ops.aten

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""By operator overload, as ``make_fx`` takes it."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _replaces(operator: Any) -> Callable[[_Function], _Function]:  # noqa: ANN401  an overload
    def register(function: _Function) -> _Function:
        DECOMPOSITIONS[operator] = function
        return function

    return register


@_replaces(aten.native_layer_norm.default)
def _layer_norm(
    x: Tensor, _shape: list[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance as products with a row of 1/K."""
    share = 1.0 / x.shape[-1]
    mean = row_sum(x, scale=share)
    centred = x - mean
    rstd = torch.rsqrt(row_sum(centred * centred, scale=share) + eps)
    return (centred * rstd) * weight + bias, mean, rstd


@_replaces(aten.native_layer_norm_backward.default)
def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    _shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    _bias: Tensor,
    _output_mask: list[bool],
) -> tuple[Tensor, None, None]:
    """The gradient of the input alone: weight and bias are frozen."""
    share = 1.0 / x.shape[-1]
    normalised = (x - mean) * rstd
    weighted = grad * weight
    along = normalised * row_sum(weighted * normalised, scale=share)
    return (weighted - row_sum(weighted, scale=share) - along) * rstd, None, None


@_replaces(aten._softmax_backward_data.default)  # noqa: SLF001  the operator's name
def _softmax_backward(grad: Tensor, output: Tensor, _dim: int, _dtype: torch.dtype) -> Tensor:
    """Over the last dimension, which is where attention takes its softmax."""
    product = grad * output
    return product - output * row_sum(product)


@_replaces(aten.gelu_backward.default)
def _gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Any:  # noqa: ANN401  or NotImplemented
    """gelu(x) = x Phi(x), so Phi is gelu(x) / x, and XNNPACK has gelu but no erf.

    The shifts make the quotient 1/2 at 0; where abs(x) is above 1e-12 they change no bit.
    """
    if approximate != "none":
        return NotImplemented
    cdf = (aten.gelu.default(x) + 0.5e-20) / (x + 1e-20)
    density_times_x = torch.exp(x * x * -0.5) * x * (1 / math.sqrt(2 * math.pi))
    return grad * (cdf + density_times_x)


@_replaces(aten.sum.dim_IntList)
def _sum(
    x: Tensor,
    dim: list[int] | None,
    keepdim: bool = False,  # noqa: FBT001, FBT002  the operator's signature
    **options: Any,  # noqa: ANN401  same
) -> Any:  # noqa: ANN401  or NotImplemented
    """Over the last dimension; other sums are left as they are."""
    if options or dim is None or [d % x.dim() for d in dim] != [x.dim() - 1]:
        return NotImplemented
    total = row_sum(x)
    return total if keepdim else total.view(x.shape[:-1])
