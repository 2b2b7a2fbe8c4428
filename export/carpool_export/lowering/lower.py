"""Functions over tensors become one ``.pte`` in which they share their frozen weights."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor
from torch.export import ExportedProgram

from carpool.errors import ExportError
from carpool_export.lowering import private
from carpool_export.lowering.decompositions import DECOMPOSITIONS
from carpool_export.lowering.passes import run_passes, split_long_sums

_LOG = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Told in a few words what happens next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodToLower:
    """A function and how it may be called.

    Attributes:
        function: of tensors, to one tensor or a tuple of tensors.
        example_inputs: sizes that differ from each other and from 0 and 1 where dynamic.
        dynamic_shapes: per input, a ``torch.export.Dim`` by dimension, or None.
    """

    function: Callable[..., Any]
    example_inputs: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any] | None, ...]


def lower_gradient_program(
    function: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    dynamic_shapes: Sequence[Mapping[int, Any] | None] | None = None,
    *,
    method: str = "forward",
    longest_sum: int | None = None,
) -> bytes:
    """The ``.pte`` of any function of tensors, backward passes included.

    The function may call ``torch.autograd.grad``; what it trains goes in as an input, and the
    gradient comes out. Frozen weights that it refers to are stored in the program. Compare the
    program with the function before you ship it: what is lowered is XNNPACK's arithmetic.

    Args:
        function: of tensors, to one tensor or a tuple of tensors; without side effects.
        example_inputs: distinct tensors; where a size is dynamic, one that differs from all
            other sizes and from 0 and 1, because equal sizes are taken for one.
        dynamic_shapes: per input, a ``torch.export.Dim`` by dimension, or None; all fixed if
            left out.
        method: its name in the program.
        longest_sum: terms that a product by a frozen matrix may add up one after the other
            (exactly: the fewest equal pieces of at most so many). For deep functions, whose error
            it brings to eager PyTorch's; costs a few percent of the time at 96.

    Raises:
        ValueError: the same example tensor twice, or not one shape per input.
        ExportError: the function could not be traced or lowered; says what went wrong.
    """
    shapes = [None] * len(example_inputs) if dynamic_shapes is None else dynamic_shapes
    if len(shapes) != len(example_inputs):
        raise ValueError(
            f"expected dynamic shapes of {len(example_inputs)} inputs, got {len(shapes)}."
        )
    described = MethodToLower(
        function=function,
        example_inputs=tuple(example_inputs),
        dynamic_shapes=tuple(None if shape is None else dict(shape) for shape in shapes),
    )
    return lower({method: described}, progress=lambda _: None, longest_sum=longest_sum)


def lower(
    methods: Mapping[str, MethodToLower],
    *,
    progress: Progress,
    longest_sum: int | None = None,
    etrecord: Path | None = None,
) -> bytes:
    """The ``.pte`` of the methods, for XNNPACK with portable kernels for the rest.

    Args:
        methods: by name.
        progress: called before each step.
        longest_sum: as for ``lower_gradient_program``.
        etrecord: where ExecuTorch's own record of the lowering goes, for its Inspector.

    Raises:
        ValueError: a method was given the same example tensor twice, which the tracer would take
            for one input.
        ExportError: a method could not be traced or lowered; says what went wrong.
    """
    for name, method in methods.items():
        if len({id(tensor) for tensor in method.example_inputs}) != len(method.example_inputs):
            raise ValueError(f"{name}: expected distinct example tensors, got one twice.")
    try:
        with private.fast_lowering(), warnings.catch_warnings():
            # torch and ExecuTorch use what they and Python deprecate; a caller cannot change it.
            warnings.simplefilter("ignore")
            return _lower(methods, progress=progress, longest_sum=longest_sum, etrecord=etrecord)
    except Exception as error:
        # Whatever it is, the model cannot be exported; the cause stays attached.
        reason = str(error).strip().splitlines() or ["no message"]
        raise ExportError(
            f"the program could not be lowered: {type(error).__name__}: {reason[0]}"
        ) from error


def _lower(
    methods: Mapping[str, MethodToLower],
    *,
    progress: Progress,
    longest_sum: int | None,
    etrecord: Path | None,
) -> bytes:
    exported = {}
    for name, method in methods.items():
        progress(f"tracing {name}")
        exported[name] = _export(method, longest_sum=longest_sum)
    progress(f"lowering {' and '.join(methods)}")
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[private.partitioner()],
        compile_config=private.edge_config(),
        generate_etrecord=etrecord is not None,
    )
    # Inputs stay where the caller has them: planned ones are copied at each call, and a
    # catalogue would take its bound's size in memory.
    config = ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
    )
    program = edge.to_executorch(config)
    if etrecord is not None:
        program.get_etrecord().save(etrecord)
    return bytes(program.buffer)


def _export(method: MethodToLower, *, longest_sum: int | None) -> ExportedProgram:
    graph_module = private.trace(
        method.function, method.example_inputs, decompositions=DECOMPOSITIONS
    )
    # Before the export, so that half of what was traced need not be traced again; and after it,
    # because it gives some calls other names.
    _LOG.debug("passes: %s", run_passes(graph_module))
    if longest_sum is not None:
        _LOG.debug("sums split: %d", split_long_sums(graph_module, longest=longest_sum))
    program = torch.export.export(
        graph_module,
        method.example_inputs,
        dynamic_shapes=method.dynamic_shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    _LOG.debug("passes again: %s", run_passes(program.graph_module))
    return program
