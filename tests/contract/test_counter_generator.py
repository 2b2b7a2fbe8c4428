"""The counter generator: its words against a second implementation, its draws against chance."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterator

import pytest

from carpool.randomness import below, happens, shuffled, words

LARGEST = 2**64 - 1

WORDS = [
    17644814081971594350,
    18323544872797078619,
    7794215624942761661,
    8150300764523000140,
    8035976539286365237,
]
ORDER = [9, 7, 4, 3, 8, 6, 1, 5, 2, 0]


def stream(device_id: str = "", round_number: int = 0) -> Iterator[int]:
    return words(
        purpose="carpool/1/order", key=b"key", device_id=device_id, round_number=round_number
    )


def literal_words(count: int, *fields: bytes) -> list[int]:
    """The definition in docs/contract.md, with struct and one concatenated string."""
    seed = hashlib.sha256(b"".join(struct.pack(">Q", len(f)) + f for f in fields)).digest()
    blocks = (hashlib.sha256(seed + struct.pack(">Q", i)).digest() for i in range(count // 4 + 1))
    return [word for block in blocks for word in struct.unpack(">4Q", block)][:count]


def critical_chi_square(freedom: int) -> float:
    """The 99.9 % point, by Wilson and Hilferty's approximation (1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(observed: Counter[object], categories: int, draws: int) -> float:
    expected = draws / categories
    seen = sum((count - expected) ** 2 / expected for count in observed.values())
    return seen + (categories - len(observed)) * expected


@pytest.mark.parametrize(
    ("key", "device_id", "round_number"),
    [(b"", "", 0), (b"\x00\xff", "Gerät 7", 12), (b"k" * 100, "d", 10**12)],
)
def test_words_follow_the_definition(key: bytes, device_id: str, round_number: int) -> None:
    """A second implementation agrees, with empty, binary and non-ASCII fields."""
    got = words(purpose="carpool/1/cohort", key=key, device_id=device_id, round_number=round_number)
    assert list(itertools.islice(got, 11)) == literal_words(
        11, b"carpool/1/cohort", key, device_id.encode(), str(round_number).encode()
    )


def test_words_never_change() -> None:
    """Literals, for implementations in other languages; computed with ``sha256sum`` by hand."""
    assert list(itertools.islice(stream("phone", 3), 5)) == WORDS
    assert shuffled(10, stream("phone", 3)) == ORDER


def test_fields_do_not_run_into_each_other() -> None:
    """Lengths go before fields: device "1" in round 23 is not device "12" in round 3."""
    first, second = stream("1", 23), stream("12", 3)
    assert next(first) != next(second)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 10, 64])
def test_below_is_uniform(bound: int) -> None:
    """Chi-square over a fixed stream, at the 99.9 % point."""
    draws, source = 6400, stream("below", bound)
    counts: Counter[object] = Counter(below(bound, source) for _ in range(draws))
    assert set(counts) <= set(range(bound))
    if bound > 1:
        assert chi_square(counts, bound, draws) < critical_chi_square(bound - 1)


def test_below_rejects_words_past_the_last_multiple() -> None:
    """2**64 = 1 modulo 3, so the largest word would favour 0: it is passed over."""
    assert below(3, iter([LARGEST, 5])) == 2
    assert below(3, iter([LARGEST - 1, 5])) == (LARGEST - 1) % 3
    assert below(2**63 + 1, iter([LARGEST, 2**63 + 1, 2**63])) == 2**63
    assert below(1, iter([LARGEST])) == 0
    assert below(2**64, iter([LARGEST])) == LARGEST


def test_shuffled_is_a_uniform_permutation() -> None:
    """Every one of the 24 orders of four is as likely, at the 99.9 % point."""
    draws, source = 4800, stream("shuffled")
    counts: Counter[object] = Counter(tuple(shuffled(4, source)) for _ in range(draws))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert chi_square(counts, 24, draws) < critical_chi_square(23)


def test_shuffled_follows_fisher_yates_from_the_last_place() -> None:
    """By hand: words 5, 4, 3 with bounds 4, 3, 2 pick places 1, 1, 1."""
    assert shuffled(4, iter([5, 4, 3])) == [0, 2, 3, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_shuffling_nothing_takes_no_word(count: int) -> None:
    """A device with one example leaves the stream where it was."""
    assert shuffled(count, iter([])) == list(range(count))


@pytest.mark.parametrize(
    ("probability", "word", "expected"),
    [
        (0.0, 0, False),
        (1.0, LARGEST, True),
        (0.5, 2**63 - 1, True),
        (0.5, 2**63, False),
        (2**-64, 0, True),
        (2**-64, 1, False),
    ],
)
def test_happens_compares_one_word(probability: float, word: int, *, expected: bool) -> None:
    """At its edges: never at 0, always at 1, and the boundary itself is out."""
    source = iter([word, 7])
    assert happens(probability, source) is expected
    assert next(source) == 7
