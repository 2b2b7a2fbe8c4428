"""Patches that keep the time of partitioning from growing with the square of a model's depth.

ExecuTorch cuts one partition after the other out of the graph, and after each copies the whole
graph and compiles it to Python; before that it asks of every two groups of nodes whether they
may be merged, with sets of all that is downstream of each node. Measured with 30 layers, half of
the time of lowering was spent there (``docs/export.md``).
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from typing import Any

from executorch.exir import lowered_backend_module
from executorch.exir.backend import backend_api
from executorch.exir.backend import utils as backend_utils
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_CREATE = backend_api._create_partitions_in_graph_module  # noqa: SLF001  its only name
_DUPLICATE = backend_utils.duplicate_constant_node


class _Downstream:
    """Which nodes depend on which: bit sets as integers, where the original has sets of nodes."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._bits = {node: 1 << place for place, node in enumerate(graph_module.graph.nodes)}
        self._below: dict[Node, int] = {}
        for node in reversed(graph_module.graph.nodes):
            below = 0
            for user in node.users:
                below |= self._bits[user] | self._below[user]
            self._below[node] = below

    def closes_a_circle(self, nodes: set[Node]) -> bool:
        """Whether something outside depends on one of the nodes, and another one on it."""
        outside = {user for node in nodes for user in node.users if user not in nodes}
        below = 0
        for user in outside:
            below |= self._below[user]
        mask = 0
        for node in nodes:
            mask |= self._bits[node]
        return bool(below & mask)


def _can_merge_partitions(self: Any, first: int, second: int, partitions: Any) -> bool:  # noqa: ANN401  ExecuTorch has no types
    """As the original answers, by what is downstream alone."""
    nodes = {*partitions[first].nodes, *partitions[second].nodes}
    return not self.dependency_viewer.closes_a_circle(nodes)


def _create_partitions(graph_module: GraphModule, *arguments: Any) -> Any:  # noqa: ANN401  same
    """Cuts out all partitions, then puts the graph in order: once, and without a copy."""
    found = _CREATE(graph_module, *arguments)
    _order(graph_module)
    return found


def _order(graph_module: GraphModule) -> None:
    """Each node behind all it depends on, otherwise in the order they have."""
    graph = graph_module.graph
    nodes = list(graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    waits = {node: len(node.all_input_nodes) for node in nodes}
    ready = [place for node, place in places.items() if not waits[node]]
    heapq.heapify(ready)
    end = graph._root  # noqa: SLF001  its only name
    while ready:
        node = nodes[heapq.heappop(ready)]
        end.prepend(node)
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, places[user])
    if any(waits.values()):
        raise RuntimeError("the partitions depend on each other in a circle")
    graph_module.recompile()


def _duplicate_constant_node(program: ExportedProgram, name: str) -> Any:  # noqa: ANN401  same
    """Without checking and compiling the whole graph for each constant; both happen later."""
    with replaced((ExportedProgram, "_validate", _nothing), (GraphModule, "recompile", _nothing)):
        return _DUPLICATE(program, name)


def _nothing(*_: object) -> None:
    return None


def _unchanged(graph_module: GraphModule) -> GraphModule:
    return graph_module


@contextlib.contextmanager
def replaced(*replacements: tuple[Any, str, object]) -> Iterator[None]:
    """Attributes with other values, while it is open."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def fast_partitioning() -> contextlib.AbstractContextManager[None]:
    """The patches, while it is open; not for several threads."""
    return replaced(
        (group_partitioner, "_DependencyViewer", _Downstream),
        (group_partitioner.GroupBasedPartitioner, "_can_merge_partitions", _can_merge_partitions),
        (lowered_backend_module, "legalize_graph", _unchanged),
        (backend_api, "_create_partitions_in_graph_module", _create_partitions),
        (backend_utils, "duplicate_constant_node", _duplicate_constant_node),
    )
