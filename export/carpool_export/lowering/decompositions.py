"""Operators that XNNPACK lacks, written in ones that it has.

Sums become matrix products with a row of ones: XNNPACK's reductions cover few shapes, its
products all that occur here. Each function has the signature of the ATen operator it replaces;
what a function does not cover it leaves as it is, and the gate at the end compares the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from carpool_export.reductions import row_sum

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
    x: Tensor, _shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance as products with a row of 1/K."""
    share = 1.0 / x.shape[-1]
    mean = row_sum(x, scale=share)
    centred = x - mean
    rstd = torch.rsqrt(row_sum(centred * centred, scale=share) + eps)
    result = centred * rstd
    result = result if weight is None else result * weight
    return (result if bias is None else result + bias), mean, rstd


@_replaces(aten.native_layer_norm_backward.default)
def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    _shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    _bias: Tensor | None,
    _output_mask: list[bool],
) -> tuple[Tensor, None, None]:
    """The gradient of the input alone: weight and bias are frozen."""
    share = 1.0 / x.shape[-1]
    normalised = (x - mean) * rstd
    weighted = grad if weight is None else grad * weight
    along = normalised * row_sum(weighted * normalised, scale=share)
    return (weighted - row_sum(weighted, scale=share) - along) * rstd, None, None


@_replaces(aten._softmax_backward_data.default)  # noqa: SLF001  the operator's name
def _softmax_backward(grad: Tensor, output: Tensor, _dim: int, _dtype: torch.dtype) -> Tensor:
    """Over the last dimension, which is where attention takes its softmax."""
    product = grad * output
    return product - output * row_sum(product)


@_replaces(aten.gelu.default)
def _gelu(x: Tensor, approximate: str = "none") -> Any:  # noqa: ANN401  or NotImplemented
    """The tanh form in full: XNNPACK's serialiser drops ``approximate`` and would run the other."""
    if approximate != "tanh":
        return NotImplemented
    return x * 0.5 * (1.0 + torch.tanh(_gelu_argument(x)))


@_replaces(aten.gelu_backward.default)
def _gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Any:  # noqa: ANN401  a tensor
    """gelu(x) = x Phi(x), so Phi is gelu(x) / x, and XNNPACK has gelu but no erf.

    The shifts make the quotient 1/2 at 0; where abs(x) is above 1e-12 they change no bit.
    """
    if approximate == "tanh":
        tanh = torch.tanh(_gelu_argument(x))
        slope = _GELU_SLOPE * (1.0 + 3 * _GELU_CUBIC * (x * x))
        return grad * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope)
    cdf = (aten.gelu.default(x) + 0.5e-20) / (x + 1e-20)
    density_times_x = torch.exp(x * x * -0.5) * x * (1 / math.sqrt(2 * math.pi))
    return grad * (cdf + density_times_x)


_GELU_SLOPE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_argument(x: Tensor) -> Tensor:
    """Of tanh, in the tanh form of gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return _GELU_SLOPE * (x + _GELU_CUBIC * (x * x * x))


@_replaces(aten.silu.default)
def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@_replaces(aten.silu_backward.default)
def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1.0 + x * (1.0 - sigmoid)))


@_replaces(aten.sigmoid_backward.default)
def _sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    return grad * (output * (1.0 - output))


@_replaces(aten.tanh_backward.default)
def _tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    return grad * (1.0 - output * output)


@_replaces(aten.threshold_backward.default)
def _threshold_backward(grad: Tensor, output: Tensor, threshold: float) -> Any:  # noqa: ANN401  or NotImplemented
    """Of relu, whose output is 0 or positive: any positive float32 times 1e38 twice is above 1."""
    if threshold != 0:
        return NotImplemented
    return grad * torch.clamp(output * 1e38 * 1e38, 0.0, 1.0)


@_replaces(aten.pow.Tensor_Scalar)
def _pow(x: Tensor, exponent: float) -> Any:  # noqa: ANN401  or NotImplemented
    """The few powers that models take."""
    if exponent == 2:  # noqa: PLR2004  what the functions below are for
        return x * x
    if exponent == 3:  # noqa: PLR2004
        return x * x * x
    if exponent == 0.5:  # noqa: PLR2004
        return torch.sqrt(x)
    if exponent == -0.5:  # noqa: PLR2004
        return torch.rsqrt(x)
    return NotImplemented


@_replaces(aten._fused_rms_norm.default)  # noqa: SLF001  the operator's name
def _rms_norm(
    x: Tensor, _shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    mean_square = row_sum(x * x, scale=1.0 / x.shape[-1])
    rstd = torch.rsqrt(mean_square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return (x * rstd if weight is None else x * rstd * weight), rstd


@_replaces(aten.mean.dim)
def _mean(
    x: Tensor,
    dim: list[int],
    keepdim: bool = False,  # noqa: FBT001, FBT002  the operator's signature
    **options: Any,  # noqa: ANN401  same
) -> Any:  # noqa: ANN401  or NotImplemented
    """Over the last dimension; other means are left as they are."""
    return _over_last(x, dim, keepdim, options, scale=1.0 / x.shape[-1])


@_replaces(aten.sum.dim_IntList)
def _sum(
    x: Tensor,
    dim: list[int] | None,
    keepdim: bool = False,  # noqa: FBT001, FBT002  the operator's signature
    **options: Any,  # noqa: ANN401  same
) -> Any:  # noqa: ANN401  or NotImplemented
    """Over the last dimension; other sums are left as they are."""
    return _over_last(x, dim, keepdim, options, scale=1.0)


def _over_last(
    x: Tensor,
    dim: list[int] | None,
    keepdim: bool,  # noqa: FBT001  as its callers
    options: dict[str, Any],
    *,
    scale: float,
) -> Any:  # noqa: ANN401  or NotImplemented
    plain = not any(value not in {None, x.dtype} for value in options.values())
    if not plain or dim is None or [d % x.dim() for d in dim] != [x.dim() - 1]:
        return NotImplemented
    total = row_sum(x, scale=scale)
    return total if keepdim else total.view(x.shape[:-1])


@_replaces(aten.slice_backward.default)
def _slice_backward(  # noqa: PLR0917  the operator's signature
    grad: Tensor, sizes: list[Any], dim: int, start: int, end: int, step: int
) -> Any:  # noqa: ANN401  or NotImplemented
    """Zeros around the gradient."""
    size = sizes[dim]
    if step != 1 or not isinstance(size, int):
        return NotImplemented
    return _padded(grad, dim % len(sizes), start, size - min(end, size))


@_replaces(aten.select_backward.default)
def _select_backward(grad: Tensor, sizes: list[Any], dim: int, index: int) -> Any:  # noqa: ANN401  or NotImplemented
    """Zeros around the gradient."""
    size, dim = sizes[dim], dim % len(sizes)
    if not isinstance(size, int):
        return NotImplemented
    return _padded(grad.unsqueeze(dim), dim, index % size, size - 1 - index % size)


def _padded(values: Tensor, dim: int, before: int, after: int) -> Any:  # noqa: ANN401  a tensor
    behind = values.dim() - 1 - dim
    return aten.constant_pad_nd.default(values, [0, 0] * behind + [before, after], 0.0)


@_replaces(aten.split_with_sizes.default)
def _split_with_sizes(x: Tensor, sizes: list[Any], dim: int = 0) -> list[Tensor]:
    """Slices: lowering does not know an operator that returns a list."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@_replaces(aten.split.Tensor)
def _split(x: Tensor, size: int, dim: int = 0) -> Any:  # noqa: ANN401  or NotImplemented
    """As above; of a known size."""
    whole = x.shape[dim]
    if not isinstance(whole, int):
        return NotImplemented
    return [x.narrow(dim, start, min(size, whole - start)) for start in range(0, whole, size)]
