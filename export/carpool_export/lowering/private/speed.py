"""Patches that change how long lowering takes and not what comes out of it.

ExecuTorch's passes interpret the whole graph anew, each of them, and several do nothing here.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import (
    XNNPACKPassManager,
    XNNPACKRemoveCloneOpsTransform,
)
from executorch.exir.passes import (
    LegalizePortableDimOrderPass,
    NormalizeTransposePass,
    ReplaceBrokenOpsWithFunctionalOpsPass,
    SymToTensorPass,
)
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from carpool_export.collecting import RARELY
from carpool_export.lowering.private.partitioning import fast_partitioning, replaced


class _OnePass(XNNPACKPassManager):  # type: ignore[misc]  # executorch has no types
    """Of XNNPACK's 17 passes over each partition, the one that matches anything here."""

    def __init__(self, exported_program: ExportedProgram, passes: list[Any] | None = None) -> None:
        super().__init__(exported_program, passes or [XNNPACKRemoveCloneOpsTransform])


@contextlib.contextmanager
def _meta_with_one_source(node: Node, pass_name: str = "") -> Iterator[None]:
    """As the original, but a node keeps its first source: the chain would grow by every pass."""
    if not (fx_traceback.should_preserve_node_meta and node.meta):
        yield
        return
    saved = fx_traceback.current_meta
    try:
        meta = node.meta.copy()
        meta["from_node"] = meta.get("from_node") or [
            fx_traceback.NodeSource(node, pass_name, fx_traceback.NodeSourceAction.CREATE)
        ]
        fx_traceback.current_meta = meta
        yield
    finally:
        fx_traceback.current_meta = saved


_DECOMPOSE = ExportedProgram.run_decompositions


def _decompose_mutations(program: ExportedProgram, *tables: Any) -> ExportedProgram:  # noqa: ANN401  decompositions
    """Traces a program anew only where something in it is changed in place.

    ``trace`` left nothing else to decompose, and ExecuTorch asks for it several times.
    """
    changes_in_place = any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001  its only name
        and node.target._schema.is_mutable  # noqa: SLF001  same
        for node in program.graph.nodes
    )
    return _DECOMPOSE(program, *tables) if changes_in_place else program


def _is_transposed(node: Node) -> bool:
    return node.target is torch.ops.aten.t.default


def _is_view(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view  # noqa: SLF001  its only name


def _takes_size_as_tensor(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001  same
        return False
    arguments = zip(node.target._schema.arguments, node.args, strict=False)  # noqa: SLF001  same
    return any(
        isinstance(declared.type, torch.TensorType)
        and isinstance(given, Node)
        and not isinstance(given.meta.get("val"), torch.Tensor)
        for declared, given in arguments
    )


def _may_mix_types(node: Node) -> bool:
    """Whether a call of several operands is not known to have them of one type."""
    values = [given.meta.get("val") if isinstance(given, Node) else None for given in node.args]
    types = {getattr(value, "dtype", None) for value in values}
    return len(node.args) > 1 and node.target in _PROMOTING and (None in types or len(types) > 1)


_PROMOTING = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.div.Tensor_mode,
    torch.ops.aten.minimum.default,
}


def _tells_dimension_order(node: Node) -> bool:
    return "dim_order" in str(node.target)


_SKIPPED_UNLESS: dict[type, Callable[[Node], bool]] = {
    LegalizePortableDimOrderPass: _tells_dimension_order,
    NormalizeTransposePass: _is_transposed,
    RemoveMixedTypeOperators: _may_mix_types,
    ReplaceBrokenOpsWithFunctionalOpsPass: _is_view,
    SymToTensorPass: _takes_size_as_tensor,
}
"""ExecuTorch's passes that replace calls one by one, and the calls that each is for."""


@contextlib.contextmanager
def _skipping_passes() -> Iterator[None]:
    def guarded(needed: Callable[[Node], bool]) -> Callable[[Any, GraphModule], PassResult]:
        def call(self: Any, graph_module: GraphModule) -> PassResult:  # noqa: ANN401  a pass
            calls = (node for node in graph_module.graph.nodes if node.op == "call_function")
            if not any(map(needed, calls)):
                return PassResult(graph_module, modified=False)
            return super(type(self), self).__call__(graph_module)  # type: ignore[no-any-return]

        return call

    for kind, needed in _SKIPPED_UNLESS.items():
        kind.__call__ = guarded(needed)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind in _SKIPPED_UNLESS:
            del kind.__call__


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Python's collector less often."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextlib.contextmanager
def fast_lowering() -> Iterator[None]:
    """The patches, and no stack traces in nodes, while it is open; not for several threads."""
    with (
        replaced(
            (ExportedProgram, "run_decompositions", _decompose_mutations),
            (xnnpack_preprocess, "XNNPACKPassManager", _OnePass),
            (fx_traceback, "set_current_meta", _meta_with_one_source),
            (torch.fx.config, "do_not_emit_stack_traces", True),
        ),
        _skipping_passes(),
        fast_partitioning(),
        _fewer_collections(),
    ):
        yield
