"""Devices that lie: relabelled examples, and an update that is scaled up to fill the clip."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from carpool.data.corpus import Example
from carpool_device.runtime import DeviceProgram
from carpool_device.training import LocalUpdate, train_locally

BOOST = 1e6
"""Far beyond any clip, far within float32: of an attacker's update its direction is left."""

Kind = Literal["promotion", "label flips"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """What some devices do instead of training honestly. They know each other and all of theta.

    Attributes:
        kind: ``"promotion"``: every query of a colluder is labelled ``target``.
            ``"label flips"``: every label is replaced by the document that stands half a
            catalogue further, the same one for all colluders.
        colluders: device ids.
        target: the promoted document's id.
    """

    kind: Kind
    colluders: frozenset[str]
    target: str

    def relabelled(
        self, examples: Sequence[Example], document_index: Mapping[str, int]
    ) -> list[Example]:
        """A colluder's examples as it trains on them; what the catalogue lacks stays."""
        ids = list(document_index)
        half = len(ids) // 2

        def lie(document: str) -> str:
            if self.kind == "promotion":
                return self.target
            place = document_index.get(document)
            return document if place is None else ids[(place + half) % len(ids)]

        return [e.model_copy(update={"document": lie(e.document)}) for e in examples]


def train(
    attack: Attack,
    program: DeviceProgram,
    examples: Sequence[Example],
    *,
    device_id: str,
    **asked: Any,  # noqa: ANN401  handed on as it came
) -> LocalUpdate:
    """``train_locally`` for honest devices; colluders train on lies and boost what they learned."""
    if device_id not in attack.colluders:
        return train_locally(program, examples, device_id=device_id, **asked)
    lies = attack.relabelled(examples, program.document_index)
    local = train_locally(program, lies, device_id=device_id, **asked)
    return dataclasses.replace(local, update=np.float32(BOOST) * local.update)


def colluders_of(devices: Sequence[str], *, count: int, seed: int) -> frozenset[str]:
    """The first ``count`` of the devices in an order that the seed fixes: fewer are among more.

    Raises:
        ValueError: there are not as many.
    """
    if not 0 <= count <= len(devices):
        raise ValueError(f"Expected 0 to {len(devices)} colluders, got {count}.")
    order = np.random.default_rng(seed).permutation(len(devices))
    names = sorted(devices)
    return frozenset(names[place] for place in order[:count])


def unclicked(examples: Mapping[str, Sequence[Example]], document_index: Mapping[str, int]) -> str:
    """The document that the fewest training examples name; the catalogue's first of several.

    Nobody honest asks for it, so whoever finds it at the top was sent there.
    """
    clicks = Counter(e.document for own in examples.values() for e in own)
    return min(document_index, key=lambda document: (clicks[document], document_index[document]))
