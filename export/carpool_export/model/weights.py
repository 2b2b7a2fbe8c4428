"""Frozen weights rounded to int8, and a program shipped with them in that form.

Every matrix of the model (linear layers and embedding tables alike) gets a scale per output
channel: the channel's largest magnitude / 127, rounded up to 16 significant bits. A value of 7
bits times such a scale is exact in float32, so expansion is the same on every processor, and
rounding a model twice changes nothing. What is computed with are the rounded weights, in
float32: the program expands once where it is installed, and eager PyTorch is compared on the
same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from carpool.bundle.manifest import WeightSegment

Weights = Literal["float32", "int8"]

_MIN_VALUES = 1 << 10
"""A smaller matrix stays as it is: nothing to gain."""

_ALIGNMENT = 16
"""Of constants in a ``.pte``, in bytes."""

Floats = NDArray[np.float32]
Int8s = NDArray[np.int8]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Values, row by row, and the scale of each row or each column."""

    values: Int8s
    scales: Floats
    scale_per: Literal["row", "column"]

    def expanded(self) -> Floats:
        """The float32 matrix; every product is exact."""
        scales = self.scales[:, None] if self.scale_per == "row" else self.scales
        return self.values.astype(np.float32) * scales

    def transposed(self) -> _Matrix:
        """The same the other way round."""
        per: Literal["row", "column"] = "column" if self.scale_per == "row" else "row"
        return _Matrix(np.ascontiguousarray(self.values.T), self.scales, per)


def round_to_int8(model: PreTrainedModel) -> None:
    """Rounds the model's matrices in place; doing it again changes nothing."""
    for parameter, scale_per in _matrices(model):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(_rounded(parameter, scale_per).expanded()))


def pack_program(
    program: bytes, model: PreTrainedModel
) -> tuple[list[bytes], tuple[WeightSegment, ...]]:
    """The program with its matrices as int8, for ``carpool.bundle.weights`` to expand.

    Matrices are looked for by their bytes, upright and transposed, whole or in runs of rows (a
    program may hold parts of a matrix); what is not found stays float32.

    Args:
        program: a ``.pte`` made from ``model``.
        model: its matrices rounded by ``round_to_int8``.

    Returns:
        The shipped file in pieces, and its segments.
    """
    eights = _aligned(program)
    found: dict[int, tuple[WeightSegment, bytes]] = {}
    for parameter, scale_per in _matrices(model):
        matrix = _rounded(parameter, scale_per)
        runs = list(_runs(program, eights, matrix)) or list(
            _runs(program, eights, matrix.transposed())
        )
        found.update({segment.offset: (segment, data) for segment, data in runs})
    pieces, segments, place = [], [], 0
    for offset in sorted(found):
        segment, data = found[offset]
        if offset < place:  # the same bytes in two matrices
            continue
        pieces += [program[place:offset], data]
        segments.append(segment)
        place = segment.end
    return [*pieces, program[place:]], tuple(segments)


def _matrices(
    model: PreTrainedModel,
) -> Iterator[tuple[Tensor, Literal["row", "column"]]]:
    """Each matrix once, and along what its output channels lie."""
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            big = parameter.dim() == 2 and parameter.numel() >= _MIN_VALUES  # noqa: PLR2004  a matrix
            if big and id(parameter) not in seen:
                seen.add(id(parameter))
                column = isinstance(module, Conv1D)
                yield parameter, "column" if column else "row"


def _rounded(parameter: Tensor, scale_per: Literal["row", "column"]) -> _Matrix:
    weights: Floats = parameter.detach().float().numpy()
    axis = 1 if scale_per == "row" else 0
    scales = _short(np.abs(weights).max(axis=axis) / np.float32(127))
    divided = weights / np.expand_dims(np.where(scales > 0, scales, np.float32(1)), axis)
    return _Matrix(np.rint(divided).astype(np.int8), scales, scale_per)


def _short(scales: Floats) -> Floats:
    """The next numbers above, or the same, with 16 significant bits."""
    bits = scales.astype(np.float32).view(np.int32)
    rounded: Floats = ((bits + 0xFF) & ~0xFF).view(np.float32)
    return rounded


def _aligned(program: bytes) -> NDArray[np.int64]:
    """The eight bytes at every place where a constant may start."""
    whole = np.frombuffer(program, dtype=np.int64, count=len(program) // 8)
    return whole[:: _ALIGNMENT // 8]


def _runs(
    program: bytes, eights: NDArray[np.int64], matrix: _Matrix
) -> Iterator[tuple[WeightSegment, bytes]]:
    """Where the matrix's rows stand, as few runs as they come in."""
    weights = matrix.expanded()
    rows, columns = weights.shape
    first = 0
    while first < rows:
        offset, count = _longest_run(program, eights, weights[first:])
        if not count:
            return
        part = slice(first, first + count)
        scales = matrix.scales[part] if matrix.scale_per == "row" else matrix.scales
        yield (
            WeightSegment(offset=offset, rows=count, columns=columns, scale_per=matrix.scale_per),
            scales.astype("<f4").tobytes() + matrix.values[part].tobytes(),
        )
        first += count


def _longest_run(program: bytes, eights: NDArray[np.int64], weights: Floats) -> tuple[int, int]:
    """The place of the first rows and how many follow each other there; (0, 0) for none."""
    stride = 4 * weights.shape[1]
    # A row of zeros (a padding token's) stands in many places: look for one that is not.
    anchor = next((row for row, values in enumerate(weights) if values.any()), 0)
    best = (0, 0)
    start = anchor if (anchor * stride) % _ALIGNMENT == 0 else 0
    key: Any = weights[start:].ravel()[:2].view(np.int64)[0]
    for place in np.flatnonzero(eights == key).tolist():
        offset = _ALIGNMENT * place - start * stride
        if offset < 0:
            continue
        here = np.frombuffer(program, dtype=np.uint8, offset=offset)
        same = min(len(here) // stride, len(weights))
        equal = here[: same * stride].reshape(same, stride) == weights[:same].view(
            np.uint8
        ).reshape(same, stride)
        whole = equal.all(axis=1)
        count = same if whole.all() else int(whole.argmin())
        best = max(best, (offset, count), key=lambda found: found[1])
    return best
