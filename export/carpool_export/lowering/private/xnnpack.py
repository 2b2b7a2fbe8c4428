"""Partitioning for XNNPACK, with products by values that are not constants."""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.xnnpack.operators.node_visitor import (
    NodeVisitor,
    register_node_visitor,
)
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig, LinearConfig
from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    GenericNodePartitionerConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNBatchMatrixMultiply,
    XNNFullyConnected,
    XNNGraph,
    XNNStaticSlice,
    XNode,
)
from executorch.backends.xnnpack.utils.utils import is_param_node
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    XNN_FLAG_TRANSPOSE_B,
    XNN_FLAG_TRANSPOSE_WEIGHTS,
    XNN_INVALID_VALUE_ID,
)
from torch.export import ExportedProgram
from torch.fx import Node


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


class _Part(GenericNodePartitionerConfig):  # type: ignore[misc]  # no types
    """``carpool::part``."""

    target_name = "part.default"

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float32 alone."""
        return [ConfigPrecisionType.FP32]


@register_node_visitor
class _PartVisitor(NodeVisitor):  # type: ignore[misc]  # executorch has no types
    """A slice whose other sizes are inferred (0): ExecuTorch's own writes them all down."""

    target = "carpool.part.default"

    def define_node(
        self, node: Node, xnn_graph: XNNGraph, vals_to_ids: dict[Node, int], debug_handle: int
    ) -> None:
        """Adds the node to XNNPACK's graph."""
        self.define_nodes_tensor_inputs_outputs(node, xnn_graph, vals_to_ids)
        operands: Any = node.args  # fx types them as nearly anything
        matrices, place = operands
        rank = matrices.meta["val"].dim()
        call = XNNStaticSlice(
            num_dims=rank,
            offsets=[place] + [0] * (rank - 1),
            sizes=[1] + [0] * (rank - 1),
            input_id=vals_to_ids[matrices],
            output_id=vals_to_ids[node],
            flags=0,
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
    return _KeepsEveryLinear(configs=[*stock, _RuntimeWeightLinear, _Matmul, _Product, _Part])
