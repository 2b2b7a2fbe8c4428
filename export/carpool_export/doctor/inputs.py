"""What the methods are called with: the golden step, or values of the right shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carpool.bundle import Bundle
from carpool.bundle.manifest import Method
from carpool.errors import BundleError, ConfigError
from carpool.packing import pack
from carpool_export.doctor.measure import Call
from carpool_export.doctor.program import StaticMethod

Arrays = Mapping[str, NDArray[np.generic]]


def call_at_the_bounds(method: StaticMethod) -> Call | None:
    """Every input at its largest: normal random floats, zeros for whole numbers.

    None where an input is not a tensor of a known dtype.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for spec in method.inputs:
        if spec is None:
            return None
        values = torch.zeros(spec.shape)
        if spec.dtype.is_floating_point:
            values = torch.randn(spec.shape, generator=generator)
        inputs.append(values.to(spec.dtype))
    return Call(inputs=inputs)


def bundle_calls(
    bundle: Bundle, golden: Arrays, *, batch: int | None, length: int | None
) -> dict[str, Call]:
    """For each method, the golden step with the bundle's own documents and theta, and as it is.

    The step has a small catalogue of its own; time and memory are to be those of the bundle's.
    With ``batch`` its rows are repeated, with ``length`` each row's tokens are, up to it.

    Raises:
        BundleError: the golden step lacks an array.
        ConfigError: ``batch`` or ``length`` is outside of the program's bounds.
    """
    methods = bundle.manifest.program.methods
    _check_bounds(methods["gradients"], batch=batch, length=length)
    missing = {s.name for m in methods.values() for s in m.inputs} - golden.keys()
    if missing:
        path = bundle.path / bundle.manifest.golden.file
        raise BundleError(f"{path}: expected arrays {sorted(missing)}, got {sorted(golden)}.")
    measured: dict[str, NDArray[np.generic]] = {
        **golden,
        **bundle.corpus(),
        "theta": bundle.initial_theta(),
    }
    if batch is not None or length is not None:
        shortest = methods["gradients"].bounds["length"].min
        measured |= _resized(golden, batch=batch, length=length, min_length=shortest)
    return {
        name: Call(
            inputs=_in_order(method, measured),
            golden=_in_order(method, golden),
            sizes=_sizes(method, measured),
        )
        for name, method in methods.items()
    }


def _check_bounds(method: Method, *, batch: int | None, length: int | None) -> None:
    for option, value, bound in (
        ("--batch", batch, method.bounds["batch"]),
        ("--length", length, method.bounds["length"]),
    ):
        if value is not None and not bound.min <= value <= bound.max:
            raise ConfigError(
                f"{option}: expected {bound.min} to {bound.max}, the program's bounds, got {value}."
            )


def _resized(
    golden: Arrays, *, batch: int | None, length: int | None, min_length: int
) -> dict[str, NDArray[np.generic]]:
    """The query's inputs, labels and weights with as many rows and tokens per row."""
    ids = golden["token_ids"].astype(np.int64)
    rows = [ids[slots[slots >= 0]] for slots in golden["slot_tokens"].astype(np.int64)]
    if length is not None:
        rows = [np.resize(row, length) for row in rows]
    count = len(rows) if batch is None else batch
    tokens = pack([rows[place % len(rows)] for place in range(count)], min_length=min_length)
    return {
        **tokens.named(),
        "labels": np.resize(golden["labels"], count),
        "example_weights": np.full(count, 1 / count, dtype=np.float32),
    }


def _in_order(method: Method, arrays: Arrays) -> list[Tensor]:
    return [torch.from_numpy(np.array(arrays[spec.name], order="C")) for spec in method.inputs]


def _sizes(method: Method, arrays: Arrays) -> dict[int, int | None]:
    """What each bound's value is in the call, by the bound."""
    found: dict[int, int | None] = {}
    for spec in method.inputs:
        for dimension, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(dimension, int) or dimension not in method.bounds:
                continue  # fixed, or theta's own length
            bound = method.bounds[dimension].max
            found[bound] = size if found.get(bound, size) == size else None
    return found
