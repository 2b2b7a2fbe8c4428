"""DP-SGD on the device: draws, sums, noise and what they cost, on the tiny bundle."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from scipy import stats

from carpool.data.corpus import Example
from carpool.errors import DeviceError, PrivacyError
from carpool.randomness import words
from carpool.rdp import ORDERS, RenyiCurve
from carpool.recipe import LocalRecipe
from carpool_device import example_noise, private_training
from carpool_device.batches import Batch
from carpool_device.example_budget import ExampleBudget
from carpool_device.example_noise import SENSITIVITY_SLACK, noise_scale, with_noise
from carpool_device.private_training import clipped_sum, drawn
from carpool_device.runtime import DeviceProgram
from carpool_device.training import LocalUpdate, train_locally

EXAMPLES = [
    Example(client="c", query=query, document=document.id)
    for query, document in itertools.islice(
        itertools.product(
            ("red cat", "green dog runs", "blue", "stone stone", "dog eats bird"), tiny.DOCUMENTS
        ),
        11,
    )
]
CLIP, RATE, NUM_VALUES = 0.5, 0.25, tiny.LAYOUT.num_values
PRIVACY = {"epsilon": 4.0, "delta": 1e-5, "max_participations": 3}
# of a standard normal variable, either side: a false alarm has probability 1e-9
ERRORS = 6.1


def recipe_with(privacy: dict[str, float] | None = None, **fields: Any) -> LocalRecipe:  # noqa: ANN401
    fields = {
        "learning_rate": RATE,
        "steps": 1,
        "batch_size": 11,
        "example_clip_norm": CLIP,
        "example_privacy": PRIVACY | (privacy or {}),
    } | fields
    return LocalRecipe(**fields)


def train(
    program: DeviceProgram,
    recipe: LocalRecipe,
    *,
    examples: list[Example] = EXAMPLES,
    budget: ExampleBudget | None = ExampleBudget(),  # noqa: B008  frozen
    theta: NDArray[np.float32] | None = None,
) -> LocalUpdate:
    return train_locally(
        program,
        examples,
        theta=np.zeros(NUM_VALUES, np.float32) if theta is None else theta,
        recipe=recipe,
        order_key=b"key",
        device_id="phone-1",
        round_number=2,
        budget=budget,
    )


def eager_sum(examples: list[Example], clip: float = CLIP) -> NDArray[np.float64]:
    """The sum of clipped gradients at theta 0, example by example, by autograd in float64."""
    model = tiny.TinyModel()
    embeddings, documents = model.embeddings.double(), model.documents.double()
    total = np.zeros(NUM_VALUES)
    for example in examples:
        ids = [2, *(tiny.VOCABULARY.index(word) for word in example.query.split()), 3]
        theta = torch.zeros(NUM_VALUES, dtype=torch.float64, requires_grad=True)
        adapter, head = model.split(theta)
        scores = (embeddings[torch.tensor(ids)].mean(0) + adapter) @ documents.T + head
        label = [document.id for document in tiny.DOCUMENTS].index(example.document)
        loss = torch.nn.functional.cross_entropy(
            tiny.LOGIT_SCALE * scores[None], torch.tensor([label])
        )
        (gradient,) = torch.autograd.grad(loss, theta)
        total += (gradient * min(1.0, clip / float(gradient.norm()))).numpy()
    return total


def our_sum(program: DeviceProgram, examples: list[Example], clip: float) -> NDArray[np.float64]:
    return clipped_sum(
        program,
        program.tokenizer.encode([example.query for example in examples]),
        [program.document_index[example.document] for example in examples],
        theta=np.zeros(NUM_VALUES, np.float32),
        l2_clip_norm=clip,
    )


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("clip", [0.5, 15.0])
def test_the_sum_is_that_of_eager_clipped_gradients(
    tiny_program: DeviceProgram, count: int, clip: float
) -> None:
    """No example, one, a full batch of four, and chunks of 4 + 1 and 4 + 4 + 3."""
    found, expected = (
        our_sum(tiny_program, EXAMPLES[:count], clip),
        eager_sum(EXAMPLES[:count], clip),
    )
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=5e-6 * max(1e-30, np.abs(expected).max())
    )


def test_the_noise_on_a_step_has_the_stated_variance(tiny_program: DeviceProgram) -> None:
    """With q = 1 all examples are drawn, so the update's distance from the sum is noise alone."""
    recipe = recipe_with()
    expected = -RATE * eager_sum(EXAMPLES) / recipe.batch_size
    runs = [train(tiny_program, recipe) for _ in range(400)]
    assert runs[0].privacy is not None
    z = runs[0].privacy.plan.noise_multiplier
    deviation = RATE * z * (1 + SENSITIVITY_SLACK) * CLIP / recipe.batch_size
    noise = (np.stack([run.update for run in runs]) - expected) / deviation
    assert abs(noise.mean()) < ERRORS / math.sqrt(noise.size)
    assert abs(np.square(noise).mean() - 1) < ERRORS * math.sqrt(2 / noise.size)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-9


def test_an_empty_draw_is_noise_alone(
    tiny_program: DeviceProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise over the same fixed number, with no call of the program."""
    monkeypatch.setattr(private_training, "drawn", lambda _count, rate: [] if rate < 1 else None)
    monkeypatch.setattr(tiny_program, "gradients", None)
    recipe = recipe_with(batch_size=5)
    runs = [train(tiny_program, recipe) for _ in range(400)]
    assert runs[0].privacy is not None
    z = runs[0].privacy.plan.noise_multiplier
    noise = np.stack([run.update for run in runs]) / (RATE * z * (1 + SENSITIVITY_SLACK) * CLIP / 5)
    assert abs(noise.mean()) < ERRORS / math.sqrt(noise.size)
    assert abs(np.square(noise).mean() - 1) < ERRORS * math.sqrt(2 / noise.size)


def test_every_step_draws_anew_and_adds_noise_anew(
    tiny_program: DeviceProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps with noise that is set: the rule, followed from sum to sum by hand."""
    draws = [[0, 3, 4, 7, 8, 10], [], [2], [1, 5]]
    left = iter(draws)
    monkeypatch.setattr(private_training, "drawn", lambda _count, **_: next(left))
    noises = np.random.default_rng(3).integers(-(2**31), 2**31, size=(4, NUM_VALUES))
    noise_left = iter(noises)
    monkeypatch.setattr(example_noise, "discrete_gaussian", lambda _n, **_: next(noise_left))
    recipe = recipe_with(steps=4, batch_size=3)
    encoded = tiny_program.tokenizer.encode([example.query for example in EXAMPLES])
    labels = [tiny_program.document_index[example.document] for example in EXAMPLES]
    theta = np.zeros(NUM_VALUES, np.float32)
    for places, noise in zip(draws, noises, strict=True):
        total = clipped_sum(
            tiny_program,
            [encoded[p] for p in places],
            [labels[p] for p in places],
            theta=theta,
            l2_clip_norm=CLIP,
        )
        grid = CLIP / 2**30
        gradient = ((np.rint(total / grid) + noise) * grid / 3).astype(np.float32)
        theta = theta - np.float32(RATE) * gradient
    np.testing.assert_array_equal(train(tiny_program, recipe).update, theta)


def test_the_sum_meets_the_noise_on_the_grid() -> None:
    """What comes back is a whole number of grid steps, so its digits tell nothing of the sum."""
    total = np.random.default_rng(1).normal(size=1000) * 3
    grid = math.ldexp(0.7, -30)

    def on_grid(values: NDArray[np.float64]) -> bool:
        return np.array_equal(np.rint(values / grid) * grid, values)

    assert on_grid(with_noise(total, noise_multiplier=1.5, clip_norm=0.7))
    assert not on_grid(total)
    assert noise_scale(1.5) == math.ceil(1.5 * 1.001 * 2**30)


def test_a_group_that_is_not_trained_gets_neither_gradient_nor_noise(
    tiny_program: DeviceProgram,
) -> None:
    """From a start that is not zero."""
    start = np.linspace(-1, 1, NUM_VALUES, dtype=np.float32)
    update = train(tiny_program, recipe_with(train=("head",), steps=3), theta=start).update
    moved = tiny.LAYOUT.group_mask(("head",))
    assert np.all(update[~moved] == 0)
    assert np.all(update[moved] != 0)


def test_examples_are_drawn_independently_at_the_stated_rate() -> None:
    """Each place's count, each pair's count and the draws' sizes, against the binomial."""
    count, rate, draws = 6, 0.3, 20_000
    table = np.zeros((draws, count))
    for row in table:
        row[drawn(count, rate=rate)] = 1

    def far(found: float, probability: float) -> bool:
        error = math.sqrt(draws * probability * (1 - probability))
        return abs(found - draws * probability) > ERRORS * error

    assert not any(far(n, rate) for n in table.sum(0))
    together = table.T @ table
    assert not any(far(together[i, j], rate**2) for i, j in itertools.combinations(range(count), 2))
    successive = (table[1:] * table[:-1]).sum(0)
    assert not any(far(n, rate**2) for n in successive)
    sizes = table.sum(1)
    assert not any(
        far(float((sizes == k).sum()), float(stats.binom.pmf(k, count, rate)))
        for k in range(count + 1)
    )


def test_a_coin_is_one_word_against_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the very edge: floor(q 2^64) words of 2^64 draw an example; all of them at q = 1."""
    for word, rate, expected in (
        (int(0.3 * 2**64) - 1, 0.3, [0]),
        (int(0.3 * 2**64), 0.3, []),
        (2**64 - 1, 1.0, [0]),
        (0, 1e-19, [0]),
        (1, 1e-19, []),
    ):
        monkeypatch.setattr(os, "urandom", lambda size, word=word: word.to_bytes(size, "big"))
        assert drawn(1, rate=rate) == expected


def test_an_expected_batch_beyond_the_programs_runs_in_chunks(tiny_program: DeviceProgram) -> None:
    """Eleven examples a step, where the program takes four, each with weight 1."""
    seen: list[Batch] = []
    call = tiny_program.gradients

    def gradients(theta: Any, batch: Batch, **options: Any) -> Any:  # noqa: ANN401
        seen.append(batch)
        return call(theta, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_program, "gradients", gradients)
        train(tiny_program, recipe_with(steps=2))
    assert [len(batch.labels) for batch in seen] == [4, 4, 3] * 2
    assert all((batch.example_weights == 1).all() for batch in seen)


def test_nothing_can_repeat_a_training(tiny_program: DeviceProgram) -> None:
    """The same task twice, with every seed there is set: no value is the same."""
    updates = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002  the point is that it changes nothing
        torch.manual_seed(1)
        updates.append(train(tiny_program, recipe_with()).update)
    assert np.all(updates[0] != updates[1])


def test_every_bit_comes_from_the_system(
    tiny_program: DeviceProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the system's source replaced, all is repeated: nothing else goes in, no task's key."""
    updates = []
    for round_number in (1, 2):
        stream = words(purpose="test", key=b"", device_id="", round_number=0)
        monkeypatch.setattr(
            os,
            "urandom",
            lambda size, stream=stream: b"".join(
                next(stream).to_bytes(8, "big") for _ in range(size // 8)
            ),
        )
        updates.append(
            train_locally(
                tiny_program,
                EXAMPLES,
                theta=np.zeros(NUM_VALUES, np.float32),
                recipe=recipe_with(batch_size=4, steps=3),
                order_key=bytes([round_number]),
                device_id="phone-1",
                round_number=round_number,
                budget=ExampleBudget(),
            ).update
        )
    np.testing.assert_array_equal(*updates)


def test_no_unnoised_fact_leaves_with_the_update(tiny_program: DeviceProgram) -> None:
    """Neither the loss nor how many examples were drawn."""
    found = train(tiny_program, recipe_with())
    assert found.num_examples is None
    assert found.mean_loss is None


# What is spent


@pytest.mark.parametrize(
    ("sizes", "batch", "steps", "epsilon"),
    [
        ((11, 11, 11), 4, 10, 4.0),
        ((3, 7, 11), 4, 10, 1.0),  # a device that gains examples needs less noise later
        ((11, 5, 2), 4, 10, 8.0),  # one that loses some needs more
        ((1, 11, 1), 2, 1, 0.5),
    ],
)
def test_the_budget_is_kept_over_a_devices_life(
    tiny_program: DeviceProgram,
    sizes: tuple[int, ...],
    batch: int,
    steps: int,
    epsilon: float,
) -> None:
    """By Opacus and by dp-accounting, over the noise, rates and steps that the device used."""
    recipe = recipe_with({"epsilon": epsilon}, batch_size=batch, steps=steps)
    budget, history, spent = ExampleBudget(), [], 0.0
    for size in sizes:
        found = train(tiny_program, recipe, examples=EXAMPLES[:size], budget=budget)
        assert found.privacy is not None
        plan, budget = found.privacy.plan, found.privacy.budget
        assert plan.sampling_rate == min(1, batch / size)
        history.append((plan.noise_multiplier, plan.sampling_rate, plan.steps))
        assert spent < found.privacy.epsilon <= epsilon
        spent = found.privacy.epsilon
    assert budget.participations == len(sizes)
    rdp, pld = RDPAccountant(), PLDAccountant()
    rdp.history = history
    for z, rate, count in history:
        pld.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(z)), count)
    assert spent == pytest.approx(rdp.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-6)
    assert pld.get_epsilon(1e-5) <= epsilon
    assert spent > 0.97 * epsilon  # and not much of it is left at the cap


def test_noise_follows_the_number_of_examples(tiny_program: DeviceProgram) -> None:
    """More examples, a smaller rate, less noise for what is left, and the other way round."""
    recipe = recipe_with(batch_size=2, steps=5)

    def noise(size: int, budget: ExampleBudget) -> tuple[float, ExampleBudget]:
        found = train(tiny_program, recipe, examples=EXAMPLES[:size], budget=budget).privacy
        assert found is not None
        return found.plan.noise_multiplier, found.budget

    first, budget = noise(4, ExampleBudget())
    assert noise(4, budget)[0] == pytest.approx(first, abs=2e-3)  # 1e-3 is a search's step
    assert noise(11, budget)[0] < first < noise(2, budget)[0]


def test_the_contracts_vector_is_what_a_device_does(tiny_program: DeviceProgram) -> None:
    """A Kotlin author may trust it."""
    page = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")

    def numbers(label: str) -> list[float]:
        (line,) = re.findall(rf"^    {label} +([\d. ]+)$", page, re.MULTILINE)
        return [float(number) for number in line.split()]

    recipe, budget = recipe_with(batch_size=4, steps=10), ExampleBudget()
    for z, epsilon in zip(numbers("multipliers"), numbers("epsilons"), strict=True):
        found = train(tiny_program, recipe, budget=budget).privacy
        assert found is not None
        assert found.plan.noise_multiplier == z
        assert found.epsilon == pytest.approx(epsilon, abs=1e-9)
        budget = found.budget
    assert budget.participations == PRIVACY["max_participations"]


def test_the_samplers_error_is_charged(tiny_program: DeviceProgram) -> None:
    """A value and step at a time, over all participations."""
    found = train(tiny_program, recipe_with(steps=7, train=("head",)))
    assert found.privacy is not None
    spent = found.privacy.budget.spent
    draws = 7 * len(tiny.DOCUMENTS)
    assert 2.0**-45 * draws < spent.log_ratio < 1.1 * 2.0**-45 * draws
    assert spent.tail == pytest.approx(4e-28 * draws)


def test_an_unchanged_devices_budget_is_known_from_its_participations(
    tiny_program: DeviceProgram,
) -> None:
    """What a simulation computes is what the device would have stored."""
    recipe = recipe_with(batch_size=4, steps=3, train=("head",))
    budget = ExampleBudget()
    for participations in range(3):
        computed = ExampleBudget.after(
            participations, num_examples=11, layout=tiny.LAYOUT, recipe=recipe
        )
        assert computed == budget
        found = train(tiny_program, recipe, budget=computed).privacy
        assert found == computed.charged(num_examples=11, layout=tiny.LAYOUT, recipe=recipe)
        budget = found.budget


def test_a_budget_survives_being_stored(tiny_program: DeviceProgram) -> None:
    """To the last bit, as JSON."""
    found = train(tiny_program, recipe_with()).privacy
    assert found is not None
    stored = found.budget.model_dump_json()
    assert ExampleBudget.model_validate_json(stored) == found.budget


# What is refused


@pytest.fixture
def refused(tiny_program: DeviceProgram) -> Callable[..., DeviceError]:
    def attempt(recipe: LocalRecipe, **options: Any) -> DeviceError:  # noqa: ANN401
        with pytest.raises(DeviceError) as caught:
            train(tiny_program, recipe, **options)
        return caught.value

    return attempt


@pytest.mark.parametrize("participations", [3, 4])
def test_a_device_at_its_cap_is_refused(
    refused: Callable[..., DeviceError], participations: int
) -> None:
    """Whole message; the reason that leaves says no more than a word."""
    budget = ExampleBudget.after(
        participations, num_examples=11, layout=tiny.LAYOUT, recipe=recipe_with()
    )
    error = refused(recipe_with(), budget=budget)
    assert str(error) == (
        "device phone-1: expected fewer than 3 participations, which the recipe allows, got "
        f"{participations}: the device must not train again."
    )
    assert error.reason == "privacy-budget-spent"


def test_a_budget_that_an_earlier_recipe_spent_is_refused(
    refused: Callable[..., DeviceError],
) -> None:
    """A recipe with less epsilon than is gone already."""
    spent = RenyiCurve(rdp=tuple(order / 2 for order in ORDERS))
    budget = ExampleBudget(participations=1, spent=spent)
    error = refused(recipe_with({"epsilon": 1.0}), budget=budget)
    assert str(error) == (
        "device phone-1: no noise is large enough for 2 more steps within epsilon 1 at delta "
        f"1e-05: {spent.epsilon(delta=1e-5):g} of it is spent."
    )
    assert error.reason == "privacy-budget-spent"


def test_a_device_without_its_books_is_refused(refused: Callable[..., DeviceError]) -> None:
    """None is not nothing spent."""
    error = refused(recipe_with(), budget=None)
    assert str(error) == (
        "device phone-1: expected its ExampleBudget, which this recipe's example_privacy spends "
        "from, got None. Hand in what it has spent so far."
    )
    assert error.reason == "recipe-not-supported"


@pytest.mark.parametrize("clip", [1e-16, 1e16])
def test_a_clip_beyond_float32s_arithmetic_is_refused(
    refused: Callable[..., DeviceError], clip: float
) -> None:
    """Whole message."""
    error = refused(recipe_with(example_clip_norm=clip))
    assert str(error) == (
        "device phone-1: expected an example_clip_norm of 1e-15 to 1e+15 with example_privacy, "
        f"got {clip}."
    )
    assert error.reason == "recipe-not-supported"


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_an_example_whose_gradient_is_not_clipped_adds_nothing(
    tiny_program: DeviceProgram, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The sixth of seven, which breaks the sum of its chunk; nobody is told."""
    call, marked = tiny_program.gradients, Example(client="c", query="sleeps", document="d-red")
    mark = tiny.VOCABULARY.index("sleeps")  # no other query has it

    def gradients(theta: Any, batch: Batch, **options: Any) -> Any:  # noqa: ANN401
        loss, gradient = call(theta, batch, **options)
        if np.any(batch.tokens.token_ids == mark):
            gradient = np.full_like(gradient, value)
        return loss, gradient

    monkeypatch.setattr(tiny_program, "gradients", gradients)
    found = our_sum(tiny_program, [*EXAMPLES[:5], marked, EXAMPLES[5]], CLIP)
    np.testing.assert_allclose(found, eager_sum(EXAMPLES[:6]), rtol=0, atol=5e-6)
    assert np.isfinite(train(tiny_program, recipe_with(), examples=[marked]).update).all()


def test_diverging_training_is_refused_and_tells_no_loss(
    refused: Callable[..., DeviceError],
) -> None:
    """Whole message."""
    error = refused(recipe_with(learning_rate=3e38, steps=2, example_clip_norm=50))
    assert str(error) == (
        "device phone-1: training diverged at step 1 of 2. Lower the recipe's learning rate, now "
        "3e+38."
    )
    assert error.reason == "diverged"


def test_a_charge_needs_a_private_recipe() -> None:
    """Whole message."""
    with pytest.raises(PrivacyError) as caught:
        ExampleBudget().charged(
            num_examples=1, layout=tiny.LAYOUT, recipe=LocalRecipe(learning_rate=1, steps=1)
        )
    assert str(caught.value) == "expected a recipe with example_privacy, got one without."
