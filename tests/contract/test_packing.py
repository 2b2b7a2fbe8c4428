"""A packed batch is the written definition: four arrays, no padding but the slots' -1."""

from __future__ import annotations

import random

import numpy as np
import pytest

from carpool.packing import PackedTokens, pack

ROWS = {
    "one row": [[7, 8, 9]],
    "one token": [[7]],
    "rows of several lengths": [[4, 5], [6], [7, 8, 9, 10], [11, 12]],
    "rows of one length": [[1, 2], [3, 4]],
    "the same row twice": [[5, 6], [5, 6]],
    "empty first": [[], [5]],
    "empty last": [[5, 6], []],
    "empty between": [[5], [], [], [6, 7]],
}


def packed(rows: list[list[int]], *, min_length: int = 1) -> PackedTokens:
    return pack([np.array(row, dtype=np.int64) for row in rows], min_length=min_length)


def random_rows(seed: int) -> list[list[int]]:
    rng = random.Random(seed)  # noqa: S311  a test's rows
    rows = [[rng.randrange(1000) for _ in range(rng.randrange(9))] for _ in range(8)]
    return [*rows, [1]]


def second_implementation(rows: list[list[int]], min_length: int) -> dict[str, list[object]]:
    """The definition followed token by token, without numpy."""
    length = max([min_length, *map(len, rows)])
    tokens = [(row, place) for row, ids in enumerate(rows) for place in range(len(ids))]
    return {
        "token_ids": [rows[row][place] for row, place in tokens],
        "token_rows": [row for row, _ in tokens],
        "token_positions": [place for _, place in tokens],
        "slot_tokens": [
            [tokens.index((row, slot)) if slot < len(ids) else -1 for slot in range(length)]
            for row, ids in enumerate(rows)
        ],
    }


@pytest.mark.parametrize("min_length", [1, 2, 12])
@pytest.mark.parametrize(
    "rows", [*ROWS.values(), *map(random_rows, range(20))], ids=[*ROWS, *map(str, range(20))]
)
def test_packing_is_the_written_definition(rows: list[list[int]], min_length: int) -> None:
    """Values, names and their order, against a construction of plain lists."""
    found = {
        name: array.tolist() for name, array in packed(rows, min_length=min_length).named().items()
    }
    assert list(found.items()) == list(second_implementation(rows, min_length).items())


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_slots_lead_back_to_their_tokens(rows: list[list[int]]) -> None:
    """Every token has one slot, in its row and at its place; every other slot is -1."""
    found = packed(rows, min_length=3)
    places = np.arange(found.token_ids.size)
    np.testing.assert_array_equal(
        found.slot_tokens[found.token_rows, found.token_positions], places
    )
    used = found.slot_tokens[found.slot_tokens != -1]
    np.testing.assert_array_equal(np.sort(used), places)
    for row, slots in zip(rows, found.slot_tokens, strict=True):
        assert found.token_ids[slots[: len(row)]].tolist() == row
        assert (slots[len(row) :] == -1).all()


def test_there_are_as_many_slots_as_the_longest_row_has_tokens() -> None:
    """And never fewer than the program takes: those stay -1."""
    assert packed([[1], [2, 3, 4]], min_length=2).slot_tokens.shape == (2, 3)
    assert packed([[1]], min_length=2).slot_tokens.tolist() == [[0, -1]]


@pytest.mark.parametrize("rows", [*ROWS.values(), [[], []], []])
def test_arrays_are_int64_and_rows_are_counted(rows: list[list[int]]) -> None:
    """Also where there is no token, which the program's bounds refuse, and not the packing."""
    found = packed(rows, min_length=2)
    assert {array.dtype for array in found.named().values()} == {np.dtype(np.int64)}
    assert found.num_rows == len(rows) == len(found.slot_tokens)
    assert found.token_ids.shape == found.token_rows.shape == found.token_positions.shape
    assert found.token_ids.shape == (sum(map(len, rows)),)
