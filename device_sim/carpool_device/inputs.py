"""A call's inputs against the manifest, before the runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from carpool.bundle.manifest import Method, Range, TensorSpec
from carpool.errors import DeviceError


def check_inputs(
    name: str, method: Method, available: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """The method's inputs in the order of the call, each compared with the manifest.

    Args:
        name: of the method, for messages.
        method: its inputs' specifications, and the bounds of its dimensions.
        available: arrays by input name; those that the method does not take are left out.

    Raises:
        DeviceError: an input is missing or of another dtype or shape, or a dimension is out of
            bounds or differs between inputs.
    """
    bound_to: dict[str, int] = {}
    arrays = []
    for spec in method.inputs:
        array = available.get(spec.name)
        if array is None:
            raise DeviceError(f"{name}: expected an input {spec.name!r}, got none.")
        if array.dtype != spec.dtype or array.ndim != len(spec.shape):
            raise _wrong_input(name, spec, array)
        for size, wanted in zip(array.shape, spec.shape, strict=True):
            if isinstance(wanted, int):
                if size != wanted:
                    raise _wrong_input(name, spec, array)
                continue
            if wanted in method.bounds:
                _check_bound(name, wanted, size, method.bounds[wanted])
            if bound_to.setdefault(wanted, size) != size:
                raise DeviceError(
                    f"{name}: expected one number of {wanted} in all inputs, got "
                    f"{bound_to[wanted]} and {size} ({spec.name})."
                )
        arrays.append(array)
    return arrays


def _check_bound(name: str, dimension: str, size: int, bound: Range) -> None:
    if not bound.min <= size <= bound.max:
        raise DeviceError(
            f"{name}: expected {dimension} in [{bound.min}, {bound.max}], got {size}."
        )


def _wrong_input(name: str, spec: TensorSpec, array: NDArray[Any]) -> DeviceError:
    shape = ", ".join(str(part) for part in spec.shape)
    return DeviceError(
        f"{name}: expected {spec.name} of {spec.dtype} ({shape}), got {array.dtype} {array.shape}."
    )
