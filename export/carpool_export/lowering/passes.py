"""Rewrites of the exported graph, before it is partitioned: each in its own function.

They leave the function computed as it is; what they change is how much of the graph XNNPACK
takes, and in how few pieces. A pass edits the graph in place and returns how often it matched.
All of them expect a functional graph of ATen operators with ``meta["val"]`` on every node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten

Pass = Callable[[Graph], int]

_KEPT_META = ("val", "tensor_meta")


def drop_identities(graph: Graph) -> int:
    """Alias, detach, fresh copies, contiguous clones, expands to the same shape: their input.

    Why: each is a copy at run time, and a node that no XNNPACK partition takes.
    """
    always = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
    found = 0
    for node in _calls(graph):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            continue
        same = (
            node.target in always
            or (node.target is aten.clone.default and _value(source).is_contiguous())
            or (
                node.target is aten.expand.default
                and list(_value(node).shape) == list(_value(source).shape)
            )
        )
        if same:
            found += _replace(node, source)
    return found


def name_views_alike(graph: Graph) -> int:
    """``_unsafe_view``: ``view``.

    Why: in a functional graph they are the same, and the later passes know one name.
    """
    found = 0
    for node in _calls(graph, aten._unsafe_view.default):  # noqa: SLF001  the operator's name
        node.target = aten.view.default
        found += 1
    return found


def cancel_transposes(graph: Graph) -> int:
    """``t(t(x))``: ``x``.

    Why: backward passes transpose what the forward pass had transposed; a copy at run time.
    """
    found = 0
    for node in _calls(graph):
        if _is_transpose(node) and _is_transpose(_arguments(node)[0]):
            found += _replace(node, _arguments(node)[0].args[0])
    return found


def products_to_linear(graph: Graph) -> int:
    """``mm(a, t(w))`` and ``addmm(b, a, t(w))``: ``linear(a, w, b)``.

    Why: XNNPACK's fully connected kernel reads ``w`` as it lies; the transpose would be a copy.
    A product with an untransposed ``w`` stays: XNNPACK has a flag for it, and the same bytes
    then serve the forward and the backward pass.
    """
    found = 0
    for node in [*_calls(graph, aten.mm.default), *_calls(graph, aten.addmm.default)]:
        *bias, left, right = _arguments(node)
        if _is_transpose(right) and not node.kwargs:
            arguments = (left, right.args[0], *bias)
            found += _replace(node, _insert(node, aten.linear.default, arguments, _value(node)))
    return found


def linear_before_view(graph: Graph) -> int:
    """``linear(view(x, (rows, k)), w)`` with x of more dimensions: ``view(linear(x, w), ...)``.

    Why: XNNPACK's kernel takes any number of leading dimensions, and the two views around a
    product (flatten, restore) then meet and cancel.
    """
    found = 0
    for node in _calls(graph, aten.linear.default):
        flat, *factors = _arguments(node)
        if not _is_view(flat):
            continue
        source = flat.args[0]
        shape, flat_shape = _value(source).shape, _value(flat).shape
        if len(shape) <= len(flat_shape) or len(flat_shape) != 2 or shape[-1] != flat_shape[-1]:  # noqa: PLR2004  rows and columns
            continue
        width = _value(node).shape[-1]
        value = _value(source).new_empty(*shape[:-1], width)
        product = _insert(node, aten.linear.default, (source, *factors), value)
        restored = _insert(node, aten.view.default, (product, [-1, width]), _value(node))
        found += _replace(node, restored)
    return found


def merge_views(graph: Graph) -> int:
    """``view(view(x, a), b)``: ``view(x, b)``; a view to the same shape: its input.

    Why: each view splits the XNNPACK partitions when its sizes are known only at run time.
    """
    found = 0
    for node in _calls(graph, aten.view.default):
        source, sizes = _arguments(node)
        while _is_view(source):
            source = source.args[0]
            node.args = (source, sizes)
            found += 1
        if tuple(_value(node).shape) == tuple(_value(source).shape):
            found += _replace(node, source)
    return found


def share_common_subexpressions(graph: Graph) -> int:
    """The same operator on the same arguments: the first of them.

    Why: the backward pass recomputes what the forward pass has (gelu, rows of ones), and every
    layer reshapes the same mask. The graph is functional, so equal calls have equal results.
    """
    found = 0
    first: dict[tuple[Any, str, str], Node] = {}
    for node in _calls(graph):
        earlier = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if earlier is not node:
            found += _replace(node, earlier)
    return found


def infer_one_size(graph: Graph) -> int:
    """``view`` with one size that is known only at run time: -1 in its place.

    Why: XNNPACK and the zero-copy views of ExecuTorch's memory planner take -1, not a value
    that is computed by the graph.
    """
    found = 0
    for node in _calls(graph, aten.view.default):
        source, sizes = _arguments(node)
        unknown = [place for place, size in enumerate(sizes) if isinstance(size, Node)]
        if len(unknown) == 1 and -1 not in sizes:
            node.args = (source, [-1 if isinstance(size, Node) else size for size in sizes])
            found += 1
    return found


PASSES: tuple[Pass, ...] = (
    drop_identities,
    name_views_alike,
    cancel_transposes,
    products_to_linear,
    linear_before_view,
    merge_views,
    share_common_subexpressions,
    infer_one_size,
)
"""In the order in which they are run; each makes room for the next."""


def run_passes(program: ExportedProgram) -> dict[str, int]:
    """Runs all ``PASSES`` on the program's graph, in place.

    Also drops the metadata that nothing reads: lowering copies it deeply in every pass.

    Returns:
        How often each pass matched, by its name.
    """
    graph = program.graph
    graph.eliminate_dead_code()
    found = {}
    for rewrite in PASSES:
        found[rewrite.__name__] = rewrite(graph)
        graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op != "output":
            node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    graph.lint()
    program.graph_module.recompile()
    return found


def _calls(graph: Graph, target: Any = None) -> list[Node]:  # noqa: ANN401  an overload
    """The graph's calls in order, as a list that survives edits; of one target if given."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and (target is None or node.target is target)
    ]


def _arguments(node: Node) -> Any:  # noqa: ANN401  fx types them as nearly anything
    return node.args


def _value(node: Any) -> torch.Tensor:  # noqa: ANN401  fx types arguments as anything
    value: torch.Tensor = node.meta["val"]
    return value


def _is_call(node: Any, *targets: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _is_view(node: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    return _is_call(node, aten.view.default)


def _is_transpose(node: Any) -> bool:  # noqa: ANN401  fx types arguments as anything
    """Whether a matrix is transposed here, under any of the names that it goes by."""
    if _is_call(node, aten.t.default):
        return True
    if _is_call(node, aten.transpose.int):
        return _value(node).dim() == 2  # noqa: PLR2004  a matrix
    return _is_call(node, aten.permute.default) and list(node.args[1]) == [1, 0]


def _insert(before: Node, target: Any, arguments: Any, value: torch.Tensor) -> Node:  # noqa: ANN401  fx types arguments as anything
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, arguments)
    node.meta["val"] = value
    return node


def _replace(node: Node, by: Any) -> int:  # noqa: ANN401  fx types arguments as anything
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    return 1
