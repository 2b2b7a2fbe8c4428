"""Rewrites of matrix products into the forms that XNNPACK's kernels take as they are."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from carpool_export.lowering.passes.graph import (
    arguments,
    aten,
    calls,
    insert,
    is_call,
    is_view,
    replace,
    swaps_last_two,
    value,
)
from carpool_export.lowering.product import PRODUCT

_MATRIX = 2
_BATCH = 3


def batched_products(graph: Graph) -> int:
    """``view(bmm(merge(a), merge(b)))``: ``product(a, b)``, where ``merge`` joins leading sizes.

    A ``b`` whose matrices were transposed is read in place; such an ``a`` is transposed first.

    Why: ``bmm`` takes three dimensions, attention has four, and views between them end a
    partition where two sizes are known only at run time. So attention becomes one partition.
    """
    found = 0
    for node in calls(graph, aten.bmm.default):
        left, transpose_left = _before_merge(arguments(node)[0])
        right, transpose_right = _before_merge(arguments(node)[1])
        if value(left).dim() == _BATCH or value(left).dim() != value(right).dim():
            continue
        sizes = list(value(left).shape)
        sizes[-2] = value(left).shape[-1 if transpose_left else -2]
        sizes[-1] = value(right).shape[-2 if transpose_right else -1]
        users = list(node.users)
        if not all(is_view(user) and list(value(user).shape) == sizes for user in users):
            continue
        if transpose_left:
            last = value(left).dim() - 1
            swapped = value(left).transpose(last - 1, last)
            left = insert(node, aten.transpose.int, (left, last - 1, last), swapped)
        product = insert(
            node, PRODUCT, (left, right, transpose_right), value(left).new_empty(sizes)
        )
        for user in users:
            found += replace(user, product)
    return found


def _before_merge(node: Node) -> tuple[Node, bool]:
    """What was merged into three dimensions, and whether its matrices were transposed since."""
    transposed = False
    while True:
        if swaps_last_two(node):
            transposed = not transposed
        elif not (is_call(node, aten.clone.default) or _merges_leading_sizes(node)):
            return node, transposed
        node = arguments(node)[0]


def _merges_leading_sizes(node: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    if not is_view(node):
        return False
    before, after = value(arguments(node)[0]), value(node)
    return before.dim() > after.dim() == _BATCH and before.shape[-2:] == after.shape[-2:]


def products_to_linear(graph: Graph) -> int:
    """``mm(a, t(w))`` and ``addmm(b, a, t(w))``: ``linear(a, w, b)``.

    Why: XNNPACK's fully connected kernel reads ``w`` as it lies; the transpose would be a copy.
    A product with an untransposed ``w`` stays: XNNPACK has a flag for it, and the same bytes
    then serve the forward and the backward pass.
    """
    found = 0
    for node in [*calls(graph, aten.mm.default), *calls(graph, aten.addmm.default)]:
        *bias, left, right = arguments(node)
        if swaps_last_two(right) and not node.kwargs:
            inputs = (left, arguments(right)[0], *bias)
            found += replace(node, insert(node, aten.linear.default, inputs, value(node)))
    return found


def products_before_view(graph: Graph) -> int:
    """``linear(view(x, (rows, k)), w)`` with x of more dimensions: ``view(linear(x, w), ...)``.

    Likewise ``mm``, which becomes ``product``.

    Why: XNNPACK's kernel takes any number of leading dimensions, and the two views around a
    product (flatten, restore) then meet and cancel.
    """
    found = 0
    for node in [*calls(graph, aten.linear.default), *calls(graph, aten.mm.default)]:
        flat, *factors = arguments(node)
        if not is_view(flat):
            continue
        source = arguments(flat)[0]
        shape, flat_shape = value(source).shape, value(flat).shape
        if not len(shape) > len(flat_shape) == _MATRIX or shape[-1] != flat_shape[-1]:
            continue
        width = value(node).shape[-1]
        whole = value(source).new_empty(*shape[:-1], width)
        if node.target is aten.linear.default:
            product = insert(node, aten.linear.default, (source, *factors), whole)
        else:
            product = insert(node, PRODUCT, (source, *factors, False), whole)
        restored = insert(node, aten.view.default, (product, [-1, width]), value(node))
        found += replace(node, restored)
    return found
