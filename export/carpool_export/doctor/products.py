"""The matrix products of a method: what its least time is reckoned from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from carpool_export.lowering.private.pte import XnnpackGraph

_FACTORS = {  # places of the two factors among an operator's arguments; the result is the last
    "aten::mm.out": (0, 1),
    "aten::bmm.out": (0, 1),
    "aten::addmm.out": (1, 2),
    "aten::linear.out": (0, 1),
}
_UNCOUNTED = {
    "XNNConv2d",
    "XNNDepthwiseConv2d",
    "XNNConvTranspose2d",
    "XNNScaledDotProductAttention",
    "aten::convolution.out",
}
"""Work of a product's kind that is not counted, and said to be so."""

PORTABLE_KERNELS = frozenset(_FACTORS)
FROZEN_KERNELS = ("Fully Connected",)
RUN_TIME_KERNELS = ("Dynamic Fully Connected", "Batch Matrix Multiply")
"""How XNNPACK's names of its kernels begin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product, its sizes at the bounds.

    Attributes:
        frozen: whether its second factor is in the file.
        rows: the result's sizes but the last; their product is M. None where it is not counted.
        columns: N.
        inner: K.
    """

    frozen: bool
    rows: tuple[int, ...] | None
    columns: int = 0
    inner: int = 0

    def operations(self, sizes: Mapping[int, int | None]) -> int | None:
        """2 M K N; None where it cannot be told.

        Args:
            sizes: what each bound's value was in the call; None for a value that two bounds
                share. Only rows change: N and K of a product by a frozen weight are the weight's.
        """
        if self.rows is None:
            return None
        rows = [sizes.get(size, size) for size in self.rows]
        if None in rows:
            return None
        return 2 * math.prod(size for size in rows if size is not None) * self.columns * self.inner


def portable_product(name: str, arguments: list[Any]) -> Product | None:
    """The product that an operator outside of the delegates computes, if it is one."""
    if name in _UNCOUNTED:
        return Product(frozen=True, rows=None)
    if name not in _FACTORS:
        return None
    first, second = (arguments[place] for place in _FACTORS[name])
    result = arguments[-1]
    return Product(
        frozen=second.allocation_info is None and second.data_buffer_idx > 0,
        rows=tuple(result.sizes[:-1]),
        columns=result.sizes[-1],
        inner=first.sizes[-1],
    )


def xnnpack_products(graph: XnnpackGraph) -> list[Product]:
    """The products of one delegate."""
    products = []
    for kind, fields in graph.nodes:
        if kind in _UNCOUNTED:
            products.append(Product(frozen=True, rows=None))
        if kind not in {"XNNFullyConnected", "XNNBatchMatrixMultiply"}:
            continue
        second = fields["filter_id" if kind == "XNNFullyConnected" else "input2_id"]
        result = graph.sizes[fields["output_id"]]
        frozen = second in graph.frozen
        # A frozen matrix in pieces: how many is the weight's, and no size of the call.
        pieces = result[:-2] if frozen and kind == "XNNBatchMatrixMultiply" else ()
        products.append(
            Product(
                frozen=frozen,
                rows=result[len(pieces) : -1],
                columns=result[-1],
                inner=graph.sizes[fields["input1_id"]][-1] * math.prod(pieces),
            )
        )
    return products
