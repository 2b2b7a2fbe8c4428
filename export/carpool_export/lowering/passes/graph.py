"""Reading and editing a graph of ATen operators, for the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

Pass = Callable[[Graph], int]


def calls(graph: Graph, target: Any = None) -> list[Node]:  # noqa: ANN401  an overload
    """The graph's calls in order, as a list that survives edits; of one target if given."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and (target is None or node.target is target)
    ]


def arguments(node: Node) -> Any:  # noqa: ANN401  fx types them as nearly anything
    """Its positional arguments."""
    return node.args


def value(node: Any) -> torch.Tensor:  # noqa: ANN401  fx types arguments as anything
    """What it computes, as a tensor without data: shape and dtype."""
    known: torch.Tensor = node.meta["val"]
    return known


def is_call(node: Any, *targets: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    """Whether it is a call of one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_view(node: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    """Whether it is a view, under the name that ``name_views_alike`` leaves."""
    return is_call(node, aten.view.default)


def dimension_order(node: Any) -> list[int] | None:  # noqa: ANN401  fx types arguments as anything
    """Where each of its dimensions stands in its input, or None if it moves none."""
    if not is_call(node, aten.t.default, aten.transpose.int, aten.permute.default):
        return None
    rank = value(node).dim()
    if node.target is aten.permute.default:
        return [place % rank for place in arguments(node)[1]]
    first, second = (0, 1) if node.target is aten.t.default else arguments(node)[1:]
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order


def swaps_last_two(node: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    """Whether each matrix in it is its input's, transposed."""
    order = dimension_order(node)
    return order is not None and order == [
        *range(len(order) - 2),
        len(order) - 1,
        len(order) - 2,
    ]


def insert(before: Node, target: Any, inputs: Sequence[Any], result: torch.Tensor) -> Node:  # noqa: ANN401  an overload
    """A new call in front of another, which computes what ``result`` looks like."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(inputs))
    node.meta["val"] = result
    return node


def replace(node: Node, by: Any) -> int:  # noqa: ANN401  fx types arguments as anything
    """Lets all users of a node use another, and drops it. Returns 1: a match."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    return 1
