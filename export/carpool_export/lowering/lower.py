"""Functions over tensors become one ``.pte`` in which they share their frozen weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor
from torch.export import ExportedProgram

from carpool.errors import ExportError
from carpool_export.lowering import private
from carpool_export.lowering.decompositions import DECOMPOSITIONS
from carpool_export.lowering.passes import run_passes

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


def lower(methods: Mapping[str, MethodToLower], *, progress: Progress) -> bytes:
    """The ``.pte`` of the methods, for XNNPACK with portable kernels for the rest.

    Args:
        methods: by name.
        progress: called before each step.

    Raises:
        ExportError: a method could not be traced or lowered; names it and what went wrong.
    """
    exported = {}
    for name, method in methods.items():
        progress(f"tracing {name}")
        try:
            exported[name] = _export(method)
        except Exception as error:
            raise ExportError(f"method {name} could not be traced: {_first_line(error)}") from error
    progress(f"lowering {' and '.join(methods)}")
    try:
        with private.fast_lowering():
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=[private.partitioner()],
                compile_config=private.edge_config(),
            )
            return bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise ExportError(f"the program could not be lowered: {_first_line(error)}") from error


def _export(method: MethodToLower) -> ExportedProgram:
    graph_module = private.trace(
        method.function, method.example_inputs, decompositions=DECOMPOSITIONS
    )
    program = torch.export.export(
        graph_module,
        method.example_inputs,
        dynamic_shapes=method.dynamic_shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    _LOG.debug("passes: %s", run_passes(program))
    return program


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
