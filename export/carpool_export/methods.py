"""The program's methods as the manifest tells them, and the same as the compiler takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim

from carpool.bundle import manifest as schema
from carpool.errors import ExportError
from carpool_export.lowering import MethodToLower
from carpool_export.program import StepFunctions
from carpool_export.trainables import Trainables

MIN_LENGTH = 2
"""Fewest slots of a row: torch.export takes 1 for a constant."""

MIN_DOCUMENTS = 2

Shape = tuple[int | schema.Dimension, ...]
Dtype = Literal["float32", "int64"]

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "int64": torch.int64}
_OUTPUTS = {"gradients": ("loss", "gradient"), "scores": ("scores",), "embed": ("embeddings",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The largest sizes that a call may have; memory is planned for them.

    Attributes:
        batch: rows.
        length: tokens of a query.
        embed_length: tokens of a text to embed.
        documents: of the catalogue, where its size is dynamic.
    """

    batch: int
    length: int
    embed_length: int
    documents: int


def describe_methods(functions: StepFunctions, bounds: Bounds) -> dict[str, schema.Method]:
    """The methods as the manifest lists them."""
    specs = _specs(functions.trainables, width=functions.encoder.width)
    return {
        name: _method(
            [specs[input_name] for input_name in functions.inputs_of(name)],
            [specs[output_name] for output_name in outputs],
            bounds,
            length=bounds.embed_length if name == "embed" else bounds.length,
        )
        for name, outputs in _OUTPUTS.items()
    }


def methods_to_lower(
    functions: StepFunctions, methods: Mapping[str, schema.Method]
) -> dict[str, MethodToLower]:
    """The methods with example inputs, whose sizes differ from each other and from all fixed ones.

    The tracer takes equal sizes for one, and a tensor that is given twice for one input.

    Raises:
        ExportError: a bound is too small to find such sizes.
    """
    documents = methods["gradients"].bounds.get("documents")
    return {
        name: _to_lower(getattr(functions, name), method, functions.trainables, documents)
        for name, method in methods.items()
    }


def _specs(trainables: Trainables, *, width: int) -> dict[str, schema.TensorSpec]:
    catalogue: int | schema.Dimension = (
        "documents" if trainables.any_catalogue else trainables.num_documents
    )
    values: int | schema.Dimension = (
        "values" if trainables.values_per_document else trainables.layout.num_values
    )
    shapes: dict[str, tuple[Dtype, Shape]] = {
        "theta": ("float32", (values,)),
        "token_ids": ("int64", ("tokens",)),
        "token_rows": ("int64", ("tokens",)),
        "token_positions": ("int64", ("tokens",)),
        "slot_tokens": ("int64", ("batch", "length")),
        "labels": ("int64", ("batch",)),
        "example_weights": ("float32", ("batch",)),
        "l2_clip_norm": ("float32", (1,)),
        "loss": ("float32", (1,)),
        "gradient": ("float32", (values,)),
        "scores": ("float32", ("batch", catalogue)),
        "embeddings": ("float32", ("batch", width)),
    }
    for name, shape in trainables.frozen_shapes.items():
        shapes[name] = ("float32", shape)
    shapes["documents"] = ("float32", (catalogue, width))
    return {
        name: schema.TensorSpec(name=name, dtype=dtype, shape=shape)
        for name, (dtype, shape) in shapes.items()
    }


def _method(
    inputs: Sequence[schema.TensorSpec],
    outputs: Sequence[schema.TensorSpec],
    bounds: Bounds,
    *,
    length: int,
) -> schema.Method:
    ranges: dict[schema.Dimension, schema.Range] = {
        "batch": schema.Range(min=1, max=bounds.batch),
        "length": schema.Range(min=MIN_LENGTH, max=length),
        "tokens": schema.Range(min=1, max=bounds.batch * length),
        "documents": schema.Range(min=MIN_DOCUMENTS, max=bounds.documents),
    }
    used = {size for spec in (*inputs, *outputs) for size in spec.shape}
    return schema.Method(
        bounds={name: bound for name, bound in ranges.items() if name in used},
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _to_lower(
    function: Any,  # noqa: ANN401  of any tensors
    method: schema.Method,
    trainables: Trainables,
    documents: schema.Range | None,
) -> MethodToLower:
    fixed = trainables.layout.num_values
    fixed -= trainables.num_documents * trainables.values_per_document
    taken = {size for spec in method.inputs for size in spec.shape if isinstance(size, int)}
    sizes: dict[str, int] = {}
    dims: dict[str, Any] = {}
    for name, bound in method.bounds.items():
        sizes[name] = _example_size(name, bound, taken)
        taken.add(sizes[name])
        dims[name] = Dim(name, min=bound.min, max=bound.max)
    if trainables.values_per_document and documents is not None:
        # theta's length follows from the catalogue's, where the method takes one
        sizes["values"] = fixed + sizes.get("documents", trainables.num_documents)
        if "documents" not in dims:
            dims["values"] = Dim("values", min=fixed + documents.min, max=fixed + documents.max)
        else:
            dims["values"] = dims["documents"] + fixed if fixed else dims["documents"]
    return MethodToLower(
        function=function,
        example_inputs=tuple(_example(spec, sizes) for spec in method.inputs),
        dynamic_shapes=tuple(_dynamic(spec, dims) for spec in method.inputs),
    )


def _example_size(name: str, bound: schema.Range, taken: set[int]) -> int:
    """A size that the tracer cannot mistake for another one; not larger than it needs to be."""
    for size in range(min(bound.max, 999), 1, -1):
        if size not in taken:
            return size
    raise ExportError(
        f"no {name} between 2 and {bound.max} differs from the model's own sizes "
        f"({sorted(taken)}); expected a larger --max-batch or --max-length."
    )


def _example(spec: schema.TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    return torch.zeros(shape, dtype=_DTYPES[spec.dtype])


def _dynamic(spec: schema.TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any] | None:
    found = {place: dims[size] for place, size in enumerate(spec.shape) if isinstance(size, str)}
    return found or None
