"""What an update tells whoever sees it: the threat model's plainest sentences, shown."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from carpool.bundle import Bundle
from carpool.data.dataset import Dataset
from carpool.recipe import LocalRecipe
from carpool_device.runtime import DeviceProgram
from carpool_device.training import train_locally

# another export takes a minute and more: the slow tests make it
PRESETS = [pytest.param("small"), pytest.param("paper", marks=pytest.mark.slow)]
RECIPE = LocalRecipe(learning_rate=0.1, epochs=1, batch_size=8, max_examples=32)

_log = logging.getLogger(__name__)  # docs/threat-model.md has the figures


@pytest.fixture
def program(preset: str, request: pytest.FixtureRequest) -> DeviceProgram:
    return DeviceProgram.load(Bundle.open(request.getfixturevalue(f"{preset}_bundle")))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_update_names_the_documents_that_were_clicked(
    program: DeviceProgram, attack_set: Path
) -> None:
    """The largest biases, or the longest rows, of as many as there are: without any training."""
    devices = Dataset.open(attack_set).part("train")
    few = [device for device in sorted(devices) if len(devices[device]) <= RECIPE.max_examples][:20]
    found = there = 0
    for device in few:
        examples = devices[device]
        local = train_locally(
            program,
            examples,
            theta=program.bundle.initial_theta(),
            recipe=RECIPE,
            order_key=b"k",
            device_id=device,
            round_number=1,
        )
        clicked = {program.document_index[example.document] for example in examples}
        guessed = np.argsort(-per_document(program, local.update))[: len(clicked)].tolist()
        found, there = found + len(clicked.intersection(guessed)), there + len(clicked)
    _log.info("%d of the %d documents that %d devices clicked", found, there, len(few))
    assert found > 0.9 * there > 100


def per_document(program: DeviceProgram, update: np.ndarray) -> np.ndarray:
    """A number for each document: its bias, or its row's length."""
    parts = program.bundle.manifest.layout.parameters(update)
    if "head.bias" in parts:
        return parts["head.bias"]
    return np.linalg.norm(parts["head.rows"], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper"])
def test_a_heads_row_points_along_the_querys_embedding(
    program: DeviceProgram, attack_set: Path
) -> None:
    """Of a device with one example: its update holds the embedding of what was typed."""
    devices = Dataset.open(attack_set).part("train")
    (example,) = next(own for own in devices.values() if len(own) == 1)
    theta = program.bundle.initial_theta()
    local = train_locally(
        program,
        [example],
        theta=theta,
        recipe=RECIPE,
        order_key=b"k",
        device_id=example.client,
        round_number=1,
    )
    row = program.bundle.manifest.layout.parameters(local.update)["head.rows"]
    row = row[program.document_index[example.document]]
    tokens = program.tokenizer.pack(program.tokenizer.encode([example.query]))
    (embedding,) = program.embed(theta, tokens)
    cosine = row @ embedding / np.linalg.norm(row) / np.linalg.norm(embedding)
    assert cosine > 0.9999
