"""From a function to a flat graph, and ExecuTorch's settings for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from executorch.exir import EdgeCompileConfig
from numpy.typing import NDArray
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes


def constant(array: NDArray[np.float32]) -> Tensor:
    """A tensor of the array's values, also while a function is traced.

    There, what torch makes is a step of the function, and a factor that is computed is packed
    for the kernel at every call; and even ``from_numpy`` gives a tensor without data.
    """
    with _disable_current_modes():
        return torch.from_numpy(array)


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

    def plain(*inputs: Tensor) -> Any:  # noqa: ANN401  the function's
        return function(*inputs)  # make_fx would count a method's self as an input

    graph_module: GraphModule = make_fx(
        plain,
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
