"""The documented counter generator behind every reproducible choice.

Equal keys give equal choices in every language: only SHA-256 and unsigned 64-bit integers
are used. This is not where privacy noise comes from: noise is never seeded.

Definition, version 1. A *stream* has a seed, the SHA-256 of its fields, each preceded by its
length in bytes as a big-endian 64-bit integer: the purpose (UTF-8), the key (bytes), the
device id (UTF-8) and the round (decimal, ASCII). Block ``i`` is SHA-256(seed || i as a
big-endian 64-bit integer) and gives four unsigned 64-bit words, big-endian, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

_WORD_RANGE = 1 << 64

Purpose = Literal["carpool/1/order", "carpool/1/cohort", "carpool/1/split"]


def words(*, purpose: Purpose, key: bytes, device_id: str, round_number: int) -> Iterator[int]:
    """The stream's unsigned 64-bit words, without end.

    Args:
        purpose: keeps streams of different uses apart.
        key: the run's key; any length.
        device_id: whose choice it is; empty where it is nobody's.
        round_number: 0 or more.
    """
    seed = hashlib.sha256()
    for field in (purpose.encode(), key, device_id.encode(), str(round_number).encode()):
        seed.update(len(field).to_bytes(8, "big"))
        seed.update(field)
    prefix = seed.digest()
    counter = 0
    while True:
        block = hashlib.sha256(prefix + counter.to_bytes(8, "big")).digest()
        for start in range(0, 32, 8):
            yield int.from_bytes(block[start : start + 8], "big")
        counter += 1


def below(bound: int, stream: Iterator[int]) -> int:
    """A uniform integer in ``[0, bound)``, by rejection: exactly uniform for uniform words.

    Takes words from ``stream`` until one is less than the largest multiple of ``bound`` that
    is at most 2**64, and returns it modulo ``bound``.
    """
    limit = _WORD_RANGE - _WORD_RANGE % bound
    while (word := next(stream)) >= limit:
        pass
    return word % bound


def shuffled(count: int, stream: Iterator[int]) -> list[int]:
    """A uniform permutation of ``range(count)``: Fisher-Yates from the last place down.

    Source: Knuth, The Art of Computer Programming, volume 2, algorithm 3.4.2 P.
    """
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = below(last + 1, stream)
        order[last], order[other] = order[other], order[last]
    return order


def happens(probability: float, stream: Iterator[int]) -> bool:
    """True with ``probability``, up to 2**-64: one word against ``probability * 2**64``."""
    return next(stream) < int(probability * _WORD_RANGE)
