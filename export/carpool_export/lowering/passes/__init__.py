"""Rewrites of the exported graph, before it is partitioned: each in its own function.

They leave the function computed as it is; what they change is how much of the graph XNNPACK
takes, and in how few pieces. A pass edits the graph in place and returns how often it matched.
All of them expect a functional graph of ATen operators with ``meta["val"]`` on every node.
"""

from __future__ import annotations

from torch.fx import GraphModule

from carpool_export.lowering.passes.graph import Pass
from carpool_export.lowering.passes.products import (
    batched_products,
    products_before_view,
    products_to_linear,
)
from carpool_export.lowering.passes.sums import pieces, split_long_sums
from carpool_export.lowering.passes.tidy import (
    drop_identities,
    infer_one_size,
    merge_transposes,
    merge_views,
    name_views_alike,
    share_common_subexpressions,
)

__all__ = ["PASSES", "Pass", "pieces", "run_passes", "split_long_sums"]

PASSES: tuple[Pass, ...] = (
    drop_identities,
    name_views_alike,
    batched_products,
    merge_transposes,
    products_to_linear,
    products_before_view,
    merge_views,
    share_common_subexpressions,
    infer_one_size,
)
"""In the order in which they are run; each makes room for the next."""

_KEPT_META = ("val", "tensor_meta")


def run_passes(module: GraphModule) -> dict[str, int]:
    """Runs all ``PASSES`` on the module's graph, in place.

    Also drops the metadata that nothing reads: lowering copies it deeply in every pass.

    Returns:
        How often each pass matched, by its name.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    found = {}
    for rewrite in PASSES:
        found[rewrite.__name__] = rewrite(graph)
        graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op != "output":
            node.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    graph.lint()
    module.recompile()
    return found
