"""Search on the device: a query against the catalogue."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from carpool.data.corpus import Document
from carpool_device.runtime import DeviceProgram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """A document that was found, and its score as the program gives it (a logit)."""

    document: Document
    score: float


def search(
    program: DeviceProgram, theta: NDArray[np.float32], query: str, *, top: int
) -> list[Hit]:
    """The ``top`` documents for a query, best first; equal scores in the catalogue's order.

    Args:
        program: of the bundle that ``theta`` belongs to.
        theta: float32, shape ``(P,)``.
        query: any text; a long one is cut as the manifest says.
        top: how many; fewer where the catalogue is smaller.

    Raises:
        ThetaError: theta does not fit the bundle's layout.
        DeviceError: the runtime failed.
    """
    rows = program.tokenizer.encode([query])
    scores = program.scores(theta, program.tokenizer.pack(rows))[0]
    documents = program.documents
    return [
        Hit(document=documents[place], score=float(scores[place]))
        for place in np.argsort(-scores, kind="stable")[:top]
    ]
