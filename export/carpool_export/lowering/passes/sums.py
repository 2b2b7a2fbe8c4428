"""Long sums in pieces, because the error of a float32 sum grows with how many terms it adds."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from carpool_export.lowering.passes.graph import (
    arguments,
    aten,
    insert,
    is_call,
    replace,
    value,
)
from carpool_export.lowering.product import PART, PRODUCT


def split_long_sums(module: GraphModule, *, longest: int) -> int:
    """``linear(x, w)`` by a frozen ``w`` with many columns: the sum of several shorter products.

    ``x`` of shape ``(rows, k)`` is read as ``pieces`` matrices of ``k / pieces`` columns, and one
    batched product multiplies each by its own part of ``w^T``. The program holds ``w^T`` instead
    of ``w``: the backward pass reads the same bytes as one matrix.

    Why: XNNPACK's kernels add a product's terms one after the other, eager PyTorch's in several
    runs, and through thirty blocks the difference is several times eager's own error.

    Args:
        module: its graph is edited in place.
        longest: terms that a product may add up one after the other.

    Returns:
        How many products were rewritten.
    """
    frozen = _frozen_matrices(module)
    numbers = itertools.count()
    found = 0
    for nodes in frozen.values():
        weight = getattr(module, str(nodes[0].target))
        count = pieces(weight.shape[1], longest=longest)
        users = [user for node in nodes for user in node.users]
        forward = [user for user in users if _is_one_product(user, nodes)]
        if count == 1 or not forward:
            continue
        transposed = weight.detach().t().contiguous()
        outputs = transposed.shape[1]
        cut = _constant(module, numbers, transposed.view(count, -1, outputs), nodes[0])
        for node in forward:
            found += _split(node, cut)
        backward = [user for user in users if _multiplies_by(user, nodes)]
        if backward:
            whole = _constant(module, numbers, transposed, nodes[0])
        for node in backward:
            linear = (arguments(node)[0], whole)
            found += replace(node, insert(node, aten.linear.default, linear, value(node)))
    module.graph.eliminate_dead_code()
    _drop_unread(module, [str(node.target) for nodes in frozen.values() for node in nodes])
    return found


def pieces(width: int, *, longest: int) -> int:
    """The fewest equal pieces of at most ``longest``; 1 where there are none of half of it."""
    fewest = -(-width // longest)
    return next((count for count in range(fewest, 2 * fewest + 1) if width % count == 0), 1)


def _split(node: Node, cut: Node) -> int:
    source, _, *bias = arguments(node)
    count, width, outputs = value(cut).shape
    rows, empty = _rows(source), value(source).new_empty
    apart = insert(node, aten.view.default, (source, [-1, count, width]), empty(rows, count, width))
    moved = insert(node, aten.permute.default, (apart, [1, 0, 2]), empty(count, rows, width))
    products = insert(node, PRODUCT, (moved, cut, False), empty(count, rows, outputs))
    shape = [*value(source).shape[:-2], -1, outputs]
    result = insert(node, aten.view.default, (_total(node, products), shape), value(node))
    if bias:
        result = insert(node, aten.add.Tensor, (result, bias[0]), value(node))
    return replace(node, result)


def _total(before: Node, matrices: Node) -> Any:  # noqa: ANN401  fx types arguments as anything
    count, *sizes = value(matrices).shape
    empty = value(matrices).new_empty
    total = None
    for place in range(count):
        part = insert(before, PART, (matrices, place), empty(1, *sizes))
        total = (
            part if total is None else insert(before, aten.add.Tensor, (total, part), value(part))
        )
    return total


def _frozen_matrices(module: GraphModule) -> dict[tuple[Any, ...], list[Node]]:
    """Nodes by the matrix they stand for: a traced tensor gets a node for every use."""
    found: dict[tuple[Any, ...], list[Node]] = {}
    for node in module.graph.nodes:
        matrix = getattr(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(matrix, Tensor) and matrix.dim() == 2:  # noqa: PLR2004  a matrix
            same = (matrix.data_ptr(), *matrix.shape, *matrix.stride())
            found.setdefault(same, []).append(node)
    return found


def _drop_unread(module: GraphModule, names: list[str]) -> None:
    """A constant that nothing reads would still be in the file."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in set(names) - read:
        delattr(module, name)


def _is_one_product(node: Node, weights: list[Node]) -> bool:
    """Whether it is ``linear`` of one matrix by one of the weights: the forward pass's."""
    if not is_call(node, aten.linear.default) or arguments(node)[1] not in weights:
        return False
    return _rows(arguments(node)[0]) is not None


def _rows(source: Any) -> Any:  # noqa: ANN401  fx types arguments as anything
    """How many rows a value has that is one matrix, else None."""
    *leading, rows, _ = value(source).shape
    return rows if all(type(size) is int and size == 1 for size in leading) else None


def _multiplies_by(node: Node, weights: list[Node]) -> bool:
    """Whether it is a product by one of the weights as it lies: the backward pass's."""
    if not is_call(node, aten.mm.default, PRODUCT) or arguments(node)[1] not in weights:
        return False
    return node.target is aten.mm.default or arguments(node)[2] is False


def _constant(module: GraphModule, numbers: Any, tensor: Tensor, before: Node) -> Node:  # noqa: ANN401  an iterator
    name = f"_split_weight_{next(numbers)}"
    module.register_buffer(name, tensor)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = tensor.to("meta")
    return node
