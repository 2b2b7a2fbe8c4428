"""Theta: the one float32 vector of everything trainable, and its layout.

Inside the program, parameter = initial value + scale * theta's values, so theta starts at
zero, theta = 0 is the untrained model, and one learning rate, one joint clip and one noise
level fit all segments.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from carpool.errors import ThetaError
from carpool.files import write_atomically
from carpool.schema import Model, canonical_id

_FORMAT = "carpool-theta-1"

Group = Literal["adapter", "head"]
"""What a segment belongs to; a recipe may train one group and leave the other."""


class Segment(Model):
    """A run of theta's values that forms one parameter of the program.

    Attributes:
        name: unique in its layout, for example ``"adapter.scale"``.
        group: ``"adapter"`` or ``"head"``.
        shape: of the parameter, row-major; its product is the segment's length.
        scale: parameter units per unit of theta; positive.
    """

    name: str
    group: Group
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    scale: Annotated[float, Field(gt=0)]

    @property
    def num_values(self) -> int:
        """How many of theta's values the segment takes."""
        return math.prod(self.shape)


class Layout(Model):
    """Which of theta's values are which parameter. Segments follow each other without a gap."""

    segments: tuple[Segment, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected at least one segment and distinct names, got {names}")
        return self

    @property
    def num_values(self) -> int:
        """Theta's length."""
        return sum(segment.num_values for segment in self.segments)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical layout: equal ids mean interchangeable thetas."""
        return canonical_id(self.model_dump(mode="json"))

    def for_documents(self, count: int) -> Layout:
        """This layout over another catalogue: the last segment, a value per document, resized.

        For programs whose ``values_per_document`` is 1.
        """
        *fixed, last = self.segments
        return Layout(segments=(*fixed, last.model_copy(update={"shape": (count,)})))

    def slices(self) -> dict[str, slice]:
        """Each segment's place in theta, by name."""
        places, start = {}, 0
        for segment in self.segments:
            places[segment.name] = slice(start, start + segment.num_values)
            start += segment.num_values
        return places

    def parameters(self, theta: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """``scale * theta`` per segment, shaped: the offsets from the initial parameters.

        Args:
            theta: float32, shape ``(num_values,)``.

        Returns:
            float32 arrays by segment name, each of its segment's shape, in parameter units.

        Raises:
            ThetaError: theta has another length or dtype.
        """
        self.check(theta, source="theta")
        places = self.slices()
        return {
            segment.name: (theta[places[segment.name]] * np.float32(segment.scale)).reshape(
                segment.shape
            )
            for segment in self.segments
        }

    def group_mask(self, groups: tuple[Group, ...]) -> NDArray[np.bool_]:
        """Bool, shape ``(num_values,)``: true where a value belongs to one of ``groups``."""
        return np.concatenate(
            [np.full(s.num_values, s.group in groups, dtype=np.bool_) for s in self.segments]
        )

    def check(self, theta: NDArray[np.float32], *, source: str) -> None:
        """Refuses a theta of another length, another dtype, or with a non-finite value.

        Raises:
            ThetaError: names ``source``, what was expected and what was found.
        """
        if theta.dtype != np.float32 or theta.shape != (self.num_values,):
            raise ThetaError(
                f"{source}: expected float32 values of shape ({self.num_values},) for layout "
                f"{self.id[:12]}, got {theta.dtype} of shape {theta.shape}."
            )
        bad = int(np.count_nonzero(~np.isfinite(theta)))
        if bad:
            raise ThetaError(f"{source}: {bad} of {theta.size} values are not finite.")


def zero_theta(layout: Layout) -> NDArray[np.float32]:
    """The untrained model: float32 zeros, shape ``(layout.num_values,)``."""
    return np.zeros(layout.num_values, dtype=np.float32)


def write_theta(
    path: Path,
    theta: NDArray[np.float32],
    *,
    layout: Layout,
    bundle_id: str | None,
    round_number: int,
) -> None:
    """Writes theta durably and atomically, with the ids of what it belongs to.

    Args:
        path: a ``.safetensors`` file.
        theta: float32, shape ``(layout.num_values,)``.
        layout: its layout, whose id goes into the file.
        bundle_id: the bundle it was trained for; None only inside a bundle, whose id is
            computed over this very file.
        round_number: the round that released it, 0 for the untrained one.

    Raises:
        ThetaError: theta does not fit the layout or is not finite.
    """
    layout.check(theta, source=str(path))
    metadata = {"format": _FORMAT, "layout": layout.id, "round": str(round_number)}
    if bundle_id is not None:
        metadata["bundle"] = bundle_id
    write_atomically(path, save({"theta": theta}, metadata=metadata))


def read_theta(path: Path, *, layout: Layout, bundle_id: str | None) -> NDArray[np.float32]:
    """Reads a theta and refuses one of another layout or bundle.

    Args:
        path: a ``.safetensors`` file.
        layout: what its values must mean.
        bundle_id: what it must have been trained for; None only for the theta inside a
            bundle, which names no bundle and is vouched for by the manifest's hash.

    Returns:
        float32, shape ``(layout.num_values,)``, all finite.

    Raises:
        ThetaError: the file cannot be read, or belongs elsewhere; the message names the file,
            what was expected and what was found.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            theta: NDArray[np.float32] = file.get_tensor("theta")
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype numpy has not
        raise ThetaError(f"{path}: expected a theta in safetensors form, got: {error}") from error
    for key, expected in (("format", _FORMAT), ("layout", layout.id), ("bundle", bundle_id)):
        found = metadata.get(key)
        if found != expected:
            raise ThetaError(
                f"{path}: expected a theta of {key} {expected}, got {key} {found}. "
                "Use the theta that was trained for this bundle."
            )
    layout.check(theta, source=str(path))
    return theta
