"""Every use of a name that torch or ExecuTorch does not promise to keep.

Tried on torch 2.13.0 and ExecuTorch 1.5.1. ``NAMES`` lists them, and a test fails when one
moves. The patches change how long lowering takes and not what comes out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import (
    XNNPACKPassManager,
    XNNPACKRemoveCloneOpsTransform,
)
from executorch.backends.xnnpack.operators.node_visitor import (
    NodeVisitor,
    register_node_visitor,
)
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig, LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNBatchMatrixMultiply,
    XNNFullyConnected,
    XNNGraph,
    XNode,
)
from executorch.backends.xnnpack.utils.utils import is_param_node
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    XNN_FLAG_TRANSPOSE_B,
    XNN_FLAG_TRANSPOSE_WEIGHTS,
    XNN_INVALID_VALUE_ID,
)
from executorch.exir import EdgeCompileConfig
from executorch.exir.passes.memory_format_ops_pass import DimOrderOpsRevertPass
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

NAMES: tuple[tuple[str, str], ...] = (
    ("executorch.backends.xnnpack.xnnpack_preprocess", "XNNPACKPassManager"),
    ("executorch.backends.xnnpack._passes", "XNNPACKPassManager.transform"),
    ("executorch.backends.xnnpack._passes", "XNNPACKRemoveCloneOpsTransform"),
    ("executorch.backends.xnnpack.operators.node_visitor", "NodeVisitor"),
    ("executorch.backends.xnnpack.operators.node_visitor", "register_node_visitor"),
    ("executorch.backends.xnnpack.partition.config", "ALL_PARTITIONER_CONFIGS"),
    ("executorch.backends.xnnpack.partition.config.gemm_configs", "GEMMConfig._get_weight_deps"),
    ("executorch.backends.xnnpack.partition.config.gemm_configs", "LinearConfig._get_weight_deps"),
    ("executorch.backends.xnnpack.partition.config.gemm_configs", "LinearConfig._get_bias_deps"),
    ("executorch.backends.xnnpack.partition.config.xnnpack_config", "ConfigPrecisionType.FP32"),
    ("executorch.backends.xnnpack.serialization.xnnpack_graph_schema", "XNNBatchMatrixMultiply"),
    ("executorch.backends.xnnpack.serialization.xnnpack_graph_schema", "XNNFullyConnected"),
    ("executorch.backends.xnnpack.serialization.xnnpack_graph_schema", "XNode"),
    ("executorch.backends.xnnpack.utils.utils", "is_param_node"),
    ("executorch.backends.xnnpack.utils.xnnpack_constants", "XNN_FLAG_TRANSPOSE_B"),
    ("executorch.backends.xnnpack.utils.xnnpack_constants", "XNN_FLAG_TRANSPOSE_WEIGHTS"),
    ("executorch.backends.xnnpack.utils.xnnpack_constants", "XNN_INVALID_VALUE_ID"),
    ("executorch.exir.passes.memory_format_ops_pass", "DimOrderOpsRevertPass"),
    ("torch._ops", "OpOverload"),
    ("torch._decomp", "core_aten_decompositions"),
    ("torch.export", "ExportedProgram.run_decompositions"),
    ("torch.fx.config", "do_not_emit_stack_traces"),
    ("torch.fx.experimental.proxy_tensor", "make_fx"),
    ("torch.fx.traceback", "NodeSource"),
    ("torch.fx.traceback", "NodeSourceAction.CREATE"),
    ("torch.fx.traceback", "current_meta"),
    ("torch.fx.traceback", "set_current_meta"),
    ("torch.fx.traceback", "should_preserve_node_meta"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
)
"""(module, attribute) of each; the last is what ``model.py`` counts on not having its name."""


def trace(
    function: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    *,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> GraphModule:
    """The function's flat graph, backward passes included, with symbolic sizes.

    ``torch.export`` alone cannot trace a function that calls ``torch.autograd.grad``.
    ``_allow_non_fake_inputs`` lets the frozen weights in as they are.
    """
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions()) | dict(decompositions)
    graph_module: GraphModule = make_fx(
        function,
        decomposition_table=table,
        tracing_mode="symbolic",
        _allow_non_fake_inputs=True,
    )(*example_inputs)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def edge_config() -> EdgeCompileConfig:
    """Without what ExecuTorch adds for others.

    No check that the graph holds core ATen operators alone: ``linear`` is none. No operators
    that tell the order of dimensions: here it is always the usual one.
    """
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


class _RuntimeWeight:
    """Of a product's configuration: its second factor may be computed."""

    def _get_weight_deps(
        self, node: Node, ep: ExportedProgram, precision: ConfigPrecisionType
    ) -> tuple[bool, list[Node]]:
        if not is_param_node(ep, node.args[1]):
            return True, []
        frozen: tuple[bool, list[Node]] = super()._get_weight_deps(  # type: ignore[misc]
            node, ep, precision
        )
        return frozen


class _RuntimeWeightLinear(_RuntimeWeight, LinearConfig):  # type: ignore[misc]  # no types
    """``linear`` whose weight and bias may be computed: theta is an input."""

    def get_original_aten(self) -> Any:  # noqa: ANN401  an overload
        """Keeps ``linear`` whole until it is partitioned."""
        return torch.ops.aten.linear.default

    def _get_bias_deps(
        self, node: Node, ep: ExportedProgram, precision: ConfigPrecisionType
    ) -> tuple[bool, list[Node]]:
        bias = node.args[2] if len(node.args) > 2 else None  # noqa: PLR2004  input, weight, bias
        if bias is not None and not is_param_node(ep, bias):
            return True, []
        frozen: tuple[bool, list[Node]] = super()._get_bias_deps(node, ep, precision)
        return frozen


class _Matmul(_RuntimeWeight, GEMMConfig):  # type: ignore[misc]  # no types
    """``mm``, which the stock set does not have."""

    target_name = "mm.default"

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  handed on
        super().__init__(weight_idx=1, bias_idx=None, act_idx=0, fused_acts=[], **options)

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float32 alone."""
        return [ConfigPrecisionType.FP32]


class _Product(_Matmul):
    """``carpool::product``."""

    target_name = "product.default"


@register_node_visitor
class _ProductVisitor(NodeVisitor):  # type: ignore[misc]  # executorch has no types
    """By a matrix: XNNPACK's fully connected kernel; by several: its batched product."""

    target = "carpool.product.default"

    def define_node(
        self, node: Node, xnn_graph: XNNGraph, vals_to_ids: dict[Node, int], debug_handle: int
    ) -> None:
        """Adds the node to XNNPACK's graph."""
        self.define_nodes_tensor_inputs_outputs(node, xnn_graph, vals_to_ids)
        operands: Any = node.args  # fx types them as nearly anything
        left, right, transpose_right = operands
        identities = {"input1_id": vals_to_ids[left], "output_id": vals_to_ids[node]}
        if right.meta["val"].dim() == 2:  # noqa: PLR2004  a matrix
            call: Any = XNNFullyConnected(
                **identities,
                filter_id=vals_to_ids[right],
                bias_id=XNN_INVALID_VALUE_ID,
                flags=0 if transpose_right else XNN_FLAG_TRANSPOSE_WEIGHTS,
            )
        else:
            call = XNNBatchMatrixMultiply(
                **identities,
                input2_id=vals_to_ids[right],
                flags=XNN_FLAG_TRANSPOSE_B if transpose_right else 0,
            )
        xnn_graph.xnodes.append(XNode(xnode_union=call, debug_handle=debug_handle))


class _KeepsEveryLinear(XnnpackPartitioner):  # type: ignore[misc]  # executorch has no types
    """Keeps ``linear`` whole without asking of each: here every one can be taken.

    Where a partitioner asks, ExecuTorch decomposes each method two times more.
    """

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:  # noqa: ARG002  the base class's signature
        """Every ``linear``; no filter."""
        return [torch.ops.aten.linear.default], None


def partitioner() -> XnnpackPartitioner:
    """XNNPACK with every stock operator, and products by values that are not constants."""
    replaced = ("linear.default", "addmm.default", "mm.default")
    stock = [config for config in ALL_PARTITIONER_CONFIGS if config.target_name not in replaced]
    return _KeepsEveryLinear(configs=[*stock, _RuntimeWeightLinear, _Matmul, _Product])


class _FewPasses(XNNPACKPassManager):  # type: ignore[misc]  # executorch has no types
    """Of XNNPACK's 17 passes over each partition, the two that match anything here."""

    def __init__(self, exported_program: ExportedProgram, passes: list[Any] | None = None) -> None:
        super().__init__(
            exported_program, passes or [XNNPACKRemoveCloneOpsTransform, DimOrderOpsRevertPass]
        )


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


@contextlib.contextmanager
def fast_lowering() -> Iterator[None]:
    """The patches, and no stack traces in nodes, while it is open; not for several threads."""
    pass_manager, set_meta = xnnpack_preprocess.XNNPACKPassManager, fx_traceback.set_current_meta
    no_traces = torch.fx.config.do_not_emit_stack_traces
    ExportedProgram.run_decompositions = _decompose_mutations  # type: ignore[method-assign]
    xnnpack_preprocess.XNNPACKPassManager = _FewPasses
    fx_traceback.set_current_meta = _meta_with_one_source
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = _DECOMPOSE  # type: ignore[method-assign]
        xnnpack_preprocess.XNNPACKPassManager = pass_manager
        fx_traceback.set_current_meta = set_meta
        torch.fx.config.do_not_emit_stack_traces = no_traces
