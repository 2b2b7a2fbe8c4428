from __future__ import annotations

import hashlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carpool.recipe import LocalRecipe
from carpool_device.batches import make_batch, plan_batches
from carpool_device.runtime import DeviceProgram


def recipe(**fields: Any) -> LocalRecipe:  # noqa: ANN401  a schema's own fields
    return LocalRecipe(learning_rate=0.1, **fields)


def plan(
    num_examples: int,
    recipe: LocalRecipe,
    *,
    key: bytes = b"key",
    device_id: str = "phone-1",
    round_number: int = 3,
) -> list[list[int]]:
    return list(
        plan_batches(
            num_examples,
            recipe=recipe,
            order_key=key,
            device_id=device_id,
            round_number=round_number,
        )
    )


def second_implementation(
    num_examples: int, recipe: LocalRecipe, key: bytes, device_id: str, round_number: int
) -> list[list[int]]:
    """The written definition followed literally, without any of carpool's code."""

    def field(data: bytes) -> bytes:
        return len(data).to_bytes(8, "big") + data

    fields = (b"carpool/1/order", key, device_id.encode(), b"%d" % round_number)
    seed = hashlib.sha256(b"".join(field(f) for f in fields)).digest()
    words = []
    for block in range(2000):
        digest = hashlib.sha256(seed + block.to_bytes(8, "big")).digest()
        words += [int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16, 24)]
    words.reverse()

    def shuffle(count: int) -> list[int]:
        places = list(range(count))
        for i in reversed(range(1, count)):
            word = words.pop()
            while word >= 2**64 - 2**64 % (i + 1):
                word = words.pop()
            j = word % (i + 1)
            places[i], places[j] = places[j], places[i]
        return places

    chosen = shuffle(num_examples)[: recipe.max_examples]
    batches = []
    while True:
        order = [chosen[i] for i in shuffle(len(chosen))]
        epoch = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        if recipe.steps and len(batches) + len(epoch) >= recipe.steps:
            return batches + epoch[: recipe.steps - len(batches)]
        batches += epoch
        if recipe.epochs and len(batches) == recipe.epochs * len(epoch):
            return batches


@pytest.mark.parametrize("num_examples", [1, 2, 7, 8, 9, 33, 100])
@pytest.mark.parametrize(
    "fields",
    [{"epochs": 1}, {"epochs": 3, "batch_size": 5}, {"steps": 1}, {"steps": 20, "max_examples": 6}],
)
def test_order_is_the_written_definition(num_examples: int, fields: dict[str, Any]) -> None:
    """A second implementation, from the words of the definition alone, gives the same batches."""
    expected = second_implementation(num_examples, recipe(**fields), b"\x00key", "phöne", 12)
    found = plan(num_examples, recipe(**fields), key=b"\x00key", device_id="phöne", round_number=12)
    assert found == expected


def test_order_stays_what_it_was() -> None:
    """A stored vector, which docs/device.md prints for devices in other languages."""
    batches = plan(
        7, recipe(epochs=2, batch_size=3, max_examples=5), key=bytes(range(32)), device_id="phone-7"
    )
    assert batches == [[6, 2, 0], [5, 1], [1, 5, 6], [2, 0]]
    printed = " ".join(f"[{' '.join(map(str, batch))}]" for batch in batches)
    document = Path(__file__).parents[2] / "docs" / "device.md"
    assert printed in document.read_text(encoding="utf-8")


def test_an_epoch_visits_each_chosen_example_once() -> None:
    """Also where the last batch is smaller."""
    for epoch_batches in (plan(20, recipe(epochs=1)), plan(20, recipe(epochs=2))[3:]):
        assert [len(b) for b in epoch_batches] == [8, 8, 4]
        assert sorted(i for b in epoch_batches for i in b) == list(range(20))


def test_epochs_have_orders_of_their_own() -> None:
    """The second epoch is another permutation of the same examples."""
    batches = plan(100, recipe(epochs=2, batch_size=8, max_examples=16))
    first, second = (list(chain(*half)) for half in (batches[:2], batches[2:]))
    assert first != second
    assert sorted(first) == sorted(second)


def test_steps_go_round_as_often_as_needed() -> None:
    """Three examples and ten steps of two rows: epochs of sizes 2, 1, 2, 1 and so on."""
    sizes = [len(b) for b in plan(3, recipe(steps=10, batch_size=2))]
    assert sizes == [2, 1] * 5


@pytest.mark.parametrize(
    "other", [{"key": b"other"}, {"device_id": "phone-2"}, {"round_number": 4}]
)
def test_key_device_and_round_each_change_the_order(other: dict[str, Any]) -> None:
    """Otherwise two devices, or two rounds, would share their random choices."""
    assert plan(50, recipe(epochs=1)) != plan(50, recipe(epochs=1), **other)


def test_every_permutation_is_equally_likely() -> None:
    """6,000 orders of three examples: chi-square at 5 degrees of freedom, 0.999 quantile."""
    counts = Counter(tuple(plan(3, recipe(epochs=1), round_number=r)[0]) for r in range(6000))
    assert len(counts) == 6
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 20.5


def test_every_example_is_equally_likely_to_be_among_the_most_examples() -> None:
    """max_examples takes the first places of a shuffle, not the first examples."""
    counts = Counter(
        i
        for r in range(3000)
        for i in plan(10, recipe(epochs=1, max_examples=3), round_number=r)[0]
    )
    expected = 3000 * 3 / 10
    assert sum((counts[i] - expected) ** 2 / expected for i in range(10)) < 27.9


def test_batches_are_drawn_lazily_from_one_stream() -> None:
    """The first batches of a long plan are those of a short one."""
    long = plan_batches(
        9, recipe=recipe(steps=10**9), order_key=b"k", device_id="d", round_number=0
    )
    short = plan_batches(9, recipe=recipe(steps=5), order_key=b"k", device_id="d", round_number=0)
    assert list(islice(long, 5)) == list(short)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_weights_its_rows_equally_in_float32(
    tiny_program: DeviceProgram, rows: int
) -> None:
    """1 / 3 is rounded once, to float32; the rows are packed with as many slots as the longest."""
    encoded = tiny_program.tokenizer.encode(["red", "red cat dog", ""][:rows])
    batch = make_batch(tiny_program.tokenizer, encoded, list(range(rows)))
    assert batch.example_weights.dtype == np.float32
    assert batch.example_weights.tolist() == [float(np.float32(1 / rows))] * rows
    assert batch.labels.tolist() == list(range(rows))
    assert batch.tokens.token_ids.tolist() == np.concatenate(encoded).tolist()
    assert batch.tokens.slot_tokens.shape == (rows, 3 if rows == 1 else 5)
    assert np.bincount(batch.tokens.token_rows).tolist() == [3, 5, 2][:rows]
