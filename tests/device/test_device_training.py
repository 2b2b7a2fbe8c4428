from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.errors import DeviceError, ThetaError
from carpool.recipe import LocalRecipe
from carpool.theta import Layout
from carpool_device.batches import make_batch, plan_batches
from carpool_device.runtime import DeviceProgram
from carpool_device.training import LocalUpdate, step, train_locally


def example(query: str, document: str = "d-red") -> Example:
    return Example(client="c", query=query, document=document)


EXAMPLES = [
    example("red cat"),
    example("green dog runs", "d-green"),
    example("blue", "d-blue"),
    example("stone stone", "d-stone"),
    example("dog eats bird", "d-dog"),
    example("cat"),
]


def train(
    program: DeviceProgram,
    examples: list[Example] = EXAMPLES,
    *,
    theta: NDArray[np.float32] | None = None,
    **fields: object,
) -> LocalUpdate:
    fields = {"learning_rate": 0.01, "epochs": 2, "batch_size": 4} | fields
    return train_locally(
        program,
        examples,
        theta=np.zeros(tiny.LAYOUT.num_values, np.float32) if theta is None else theta,
        recipe=LocalRecipe(**fields),
        order_key=b"key",
        device_id="phone-1",
        round_number=2,
    )


def values(seed: int, size: int = 1000) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("proximal", [0.0, 0.1])
def test_every_operation_of_the_rule_is_rounded_to_float32(proximal: float) -> None:
    """Against a loop over values in float64, rounded by hand after each operation.

    The product of two float32 values is exact in float64, so one rounding gives the float32
    product; sums of float32 values likewise. A fused multiply-subtract gives other bits.
    """
    theta, gradient, start = values(1), values(2), values(3)
    recipe = LocalRecipe(learning_rate=0.03, steps=1, proximal_weight=proximal)
    trained = np.arange(1000) % 3 != 0
    found = step(theta, gradient, start=start, recipe=recipe, trained=trained)

    def rounded(value: float) -> float:
        return float(np.float32(value))

    rate, weight = rounded(0.03), rounded(proximal)
    expected, fused = [], []
    for t, g, s, moves in zip(theta, gradient, start, trained, strict=True):
        slope = float(g)
        if proximal:
            slope = rounded(slope + rounded(weight * rounded(float(t) - float(s))))
        slope = slope if moves else 0.0
        expected.append(rounded(float(t) - rounded(rate * slope)))
        fused.append(rounded(float(t) - rate * slope))
    assert found.dtype == np.float32
    assert found.tolist() == expected
    assert expected != fused  # the test can tell the two apart


def test_training_is_the_written_loop(tiny_program: DeviceProgram) -> None:
    """Plan, batch, gradient, rule: written out here once more, with equal bits."""
    recipe = LocalRecipe(learning_rate=0.01, epochs=3, batch_size=4, max_examples=5)
    start = values(4, tiny.LAYOUT.num_values)
    theta, losses, rows = start, 0.0, 0
    plan = plan_batches(6, recipe=recipe, order_key=b"key", device_id="phone-1", round_number=2)
    for places in plan:
        encoded = tiny_program.tokenizer.encode([EXAMPLES[p].query for p in places])
        labels = [[d.id for d in tiny.DOCUMENTS].index(EXAMPLES[p].document) for p in places]
        batch = make_batch(tiny_program.tokenizer, encoded, labels)
        loss, gradient = tiny_program.gradients(theta, batch, l2_clip_norm=1e30)
        theta = theta - np.float32(0.01) * gradient
        losses += loss * len(places)
        rows += len(places)
    kept = start.copy()
    found = train(tiny_program, theta=start, epochs=3, max_examples=5)
    np.testing.assert_array_equal(found.update, theta - start)
    np.testing.assert_array_equal(start, kept)
    assert found.update.dtype == np.float32
    assert found.num_examples == 5
    assert found.mean_loss == pytest.approx(losses / rows, rel=1e-12)


def test_training_lowers_the_loss(tiny_program: DeviceProgram) -> None:
    """Long training on six queries learns them."""
    first, later = train(tiny_program, steps=1, epochs=None), train(tiny_program, epochs=60)
    assert later.mean_loss < 0.7 * first.mean_loss


@pytest.mark.parametrize("group", ["adapter", "head"])
def test_a_group_that_is_not_trained_stays_as_it_is(
    tiny_program: DeviceProgram, group: str
) -> None:
    """Also with a proximal term, and from a start that is not zero."""
    start = values(5, tiny.LAYOUT.num_values)
    update = train(tiny_program, theta=start, train=(group,), proximal_weight=0.1).update
    moved = tiny.LAYOUT.group_mask((group,))
    assert np.all(update[~moved] == 0)
    assert np.all(update[moved] != 0)


def test_a_proximal_term_keeps_theta_near_its_start(tiny_program: DeviceProgram) -> None:
    """FedProx with a large weight moves less than without."""
    free = train(tiny_program, epochs=20).update
    held = train(tiny_program, epochs=20, proximal_weight=20.0).update
    assert np.linalg.norm(held) < np.linalg.norm(free)


def test_an_example_clip_bounds_the_step(tiny_program: DeviceProgram) -> None:
    """One step moves theta by at most learning rate times the bound."""
    update = train(tiny_program, steps=1, epochs=None, example_clip_norm=0.5).update
    assert 0 < np.linalg.norm(update) <= 0.01 * 0.5 * (1 + 1e-5)
    assert np.linalg.norm(train(tiny_program, steps=1, epochs=None).update) > 0.01 * 0.5


@pytest.mark.parametrize("fields", [{}, {"steps": 5, "epochs": None}])
def test_one_example_is_enough(tiny_program: DeviceProgram, fields: dict[str, Any]) -> None:
    """A client with a single query trains on batches of one row."""
    found = train(tiny_program, EXAMPLES[:1], **fields)
    assert found.num_examples == 1
    assert np.any(found.update)


@pytest.mark.parametrize("query", ["\x00", "é雪🙂", "red cat " * 1250, "x" * 10_000, " . "])
def test_odd_queries_are_trained_on(tiny_program: DeviceProgram, query: str) -> None:
    """Non-ASCII, without a word, 10,000 characters: a finite update, never a crash."""
    found = train(tiny_program, [example(query), EXAMPLES[1]])
    assert np.isfinite(found.update).all()
    assert found.num_examples == 2


def test_an_empty_query_is_trained_on(tiny_program: DeviceProgram) -> None:
    """The data sets refuse blank queries; a device's own text may be empty all the same."""
    empty = Example.model_construct(client="c", query="", document="d-red")
    assert np.isfinite(train(tiny_program, [empty]).update).all()


def test_num_examples_counts_those_that_were_in_a_batch(tiny_program: DeviceProgram) -> None:
    """One step of four rows uses four of the six examples."""
    assert train(tiny_program, steps=1, epochs=None).num_examples == 4


def test_an_unknown_document_is_refused_by_device_and_example(tiny_program: DeviceProgram) -> None:
    """Whole message."""
    with pytest.raises(DeviceError) as caught:
        train(tiny_program, [*EXAMPLES, example("red", "d-missing")])
    bundle_id = tiny_program.bundle.id[:12]
    assert str(caught.value) == (
        "device phone-1: example 7 of 7: unknown document id 'd-missing'; expected one of the 5 "
        f"documents of bundle {bundle_id}."
    )


def test_a_device_without_examples_is_refused(tiny_program: DeviceProgram) -> None:
    """Whole message."""
    with pytest.raises(DeviceError) as caught:
        train(tiny_program, [])
    assert str(caught.value) == "device phone-1: expected at least one example, got none."


def test_a_recipe_that_trains_nothing_of_the_bundle_is_refused(
    make_tiny: Callable[..., Bundle],
) -> None:
    """A head-only bundle under a recipe for adapters."""
    segments = [s.model_copy(update={"group": "head"}) for s in tiny.LAYOUT.segments]
    program = DeviceProgram.load(make_tiny(layout=Layout(segments=tuple(segments))))
    with pytest.raises(DeviceError) as caught:
        train(program, train=("adapter",))
    assert caught.value.reason == "recipe-not-supported"
    assert str(caught.value) == (
        "device phone-1: expected a recipe that trains a part of this bundle's theta, got train = "
        "['adapter']; the bundle has ['head']."
    )


def test_a_recipe_beyond_the_programs_bound_is_refused(tiny_program: DeviceProgram) -> None:
    """Before anything is computed, and naming both numbers."""
    with pytest.raises(DeviceError) as caught:
        train(tiny_program, batch_size=5)
    assert str(caught.value) == (
        "device phone-1: expected a batch size of at most 4, which the program takes, got 5 in "
        "the recipe."
    )


def test_a_theta_of_another_layout_is_refused(tiny_program: DeviceProgram) -> None:
    """Names the device, the expected shape and what was found."""
    with pytest.raises(ThetaError) as caught:
        train(tiny_program, theta=np.zeros(14, np.float32))
    assert str(caught.value) == (
        "device phone-1: theta: expected float32 values of shape (13,) for layout "
        f"{tiny.LAYOUT.id[:12]}, got float32 of shape (14,)."
    )


def test_diverging_training_is_refused_and_names_the_rate(tiny_program: DeviceProgram) -> None:
    """An update with an infinity must not leave the device."""
    with pytest.raises(
        DeviceError, match=r"^device phone-1: training diverged at step \d+ of \d+ .*now 1e\+38\.$"
    ):
        train(tiny_program, learning_rate=1e38, epochs=20)
