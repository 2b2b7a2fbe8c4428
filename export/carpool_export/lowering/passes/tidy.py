"""Rewrites that leave fewer operators and fewer reasons to end a partition."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from carpool_export.lowering.passes.graph import (
    arguments,
    aten,
    calls,
    dimension_order,
    insert,
    is_call,
    is_view,
    replace,
    value,
)


def drop_identities(graph: Graph) -> int:
    """Alias, detach, fresh copies, contiguous clones, expands to the same shape: their input.

    Why: each is a copy at run time, and a node that no XNNPACK partition takes.
    """
    always = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
    found = 0
    for node in calls(graph):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            continue
        same = (
            node.target in always
            or (node.target is aten.clone.default and value(source).is_contiguous())
            or (
                node.target is aten.expand.default
                and list(value(node).shape) == list(value(source).shape)
            )
        )
        if same:
            found += replace(node, source)
    return found


def name_views_alike(graph: Graph) -> int:
    """``_unsafe_view``, and ``unsqueeze`` and ``squeeze`` with at most one unknown size: ``view``.

    Why: in a functional graph they are the same, and the later passes know one name; a view
    costs nothing at run time, the others are copies.
    """
    found = 0
    for node in calls(graph, aten._unsafe_view.default):  # noqa: SLF001  the operator's name
        node.target = aten.view.default
        found += 1
    for node in [
        *calls(graph, aten.unsqueeze.default),
        *calls(graph, aten.squeeze.dim),
        *calls(graph, aten.squeeze.dims),
    ]:
        sizes = [size if isinstance(size, int) else -1 for size in value(node).shape]
        if sizes.count(-1) <= 1:
            view = insert(node, aten.view.default, (arguments(node)[0], sizes), value(node))
            found += replace(node, view)
    return found


def merge_transposes(graph: Graph) -> int:
    """``permute(permute(x, p), q)``: ``permute(x, p[q])``; where nothing moves in the end: ``x``.

    Copies between the two are dropped with them. ``t`` and ``transpose`` become ``permute``,
    which is the name that XNNPACK takes.

    Why: each is a copy at run time, and backward passes transpose what the forward pass had
    transposed.
    """
    found = 0
    for node in calls(graph):
        outer = dimension_order(node)
        if outer is None:
            continue
        source = arguments(node)[0]
        while is_call(source, aten.clone.default):
            source = arguments(source)[0]
        inner = dimension_order(source)
        if inner is None:
            if node.target is not aten.permute.default:
                whole = arguments(node)[0]
                found += replace(
                    node, insert(node, aten.permute.default, (whole, outer), value(node))
                )
            continue
        source, order = arguments(source)[0], [inner[place] for place in outer]
        if order == sorted(order):
            found += replace(node, source)
        else:
            merged = insert(node, aten.permute.default, (source, order), value(node))
            found += replace(node, merged)
    return found


def merge_views(graph: Graph) -> int:
    """``view(view(x, a), b)``: ``view(x, b)``; a view to the same shape: its input.

    Why: each view splits the XNNPACK partitions when its sizes are known only at run time.
    """
    found = 0
    for node in calls(graph, aten.view.default):
        source, sizes = arguments(node)
        while is_view(source):
            source = source.args[0]
            node.args = (source, sizes)
            found += 1
        if tuple(value(node).shape) == tuple(value(source).shape):
            found += replace(node, source)
    return found


_RECOMPUTED = {aten.gelu.default, aten.sigmoid.default}


def share_common_subexpressions(graph: Graph) -> int:
    """The same operator on the same arguments: the first of them.

    Why: the backward pass recomputes what the forward pass has (rows of ones), and every layer
    reshapes the same mask. The graph is functional, so equal calls have equal results. Not the
    activation between a block's two wide layers: it is computed from what the backward pass needs
    anyway, and kept until then it would be the largest value in the planned memory.
    """
    found = 0
    first: dict[tuple[Any, str, str], Node] = {}
    for node in calls(graph):
        if node.target in _RECOMPUTED:
            continue
        earlier = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if earlier is not node:
            found += replace(node, earlier)
    return found


def infer_one_size(graph: Graph) -> int:
    """``view`` with one size that is known only at run time: -1 in its place.

    Why: XNNPACK and the zero-copy views of ExecuTorch's memory planner take -1, not a value
    that is computed by the graph.
    """
    found = 0
    for node in calls(graph, aten.view.default):
        source, sizes = arguments(node)
        unknown = [place for place, size in enumerate(sizes) if isinstance(size, Node)]
        if len(unknown) == 1 and -1 not in sizes:
            node.args = (source, [-1 if isinstance(size, Node) else size for size in sizes])
            found += 1
    return found
