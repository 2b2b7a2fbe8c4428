"""A small bundle without any model in it: what the contract checks needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle.manifest import (
    CoreHead,
    Documents,
    Golden,
    Licence,
    Method,
    Parity,
    Program,
    Range,
    RuntimeRange,
    ScaleBiasAdapter,
    SourceModel,
    TensorSpec,
    Tokenizer,
)
from carpool.data.corpus import Document, write_lines
from carpool.theta import Layout, Segment, write_theta, zero_theta

WIDTH, RANK, COUNT = 4, 2, 3

LAYOUT = Layout(
    segments=(
        Segment(name="adapter.scale", group="adapter", shape=(WIDTH,), scale=0.25),
        Segment(name="head.core", group="head", shape=(RANK, RANK), scale=1.0),
    )
)


def manifest_fields() -> dict[str, Any]:
    return {
        "carpool_version": "0.1.0",
        "preset": "small",
        "model": SourceModel(
            name="none",
            architecture="bert",
            hidden_size=WIDTH,
            pooling="mean",
            normalize=True,
            weights_sha256="0" * 64,
        ),
        "adapter": ScaleBiasAdapter(),
        "head": CoreHead(rank=RANK, document_bias=False),
        "logit_scale": 16.0,
        "layout": LAYOUT,
        "theta_file": "theta.safetensors",
        "documents": Documents(
            file="documents.jsonl",
            count=COUNT,
            embedding_length=8,
            corpus_file="corpus.safetensors",
        ),
        "program": Program(
            file="program.pte",
            runtime=RuntimeRange(at_least="1.0", below="2.0"),
            batch=Range(min=1, max=8),
            length=Range(min=2, max=64),
            methods={
                "scores": Method(
                    inputs=(TensorSpec(name="theta", dtype="float32", shape=(8,)),),
                    outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", COUNT)),),
                )
            },
        ),
        "tokenizer": Tokenizer(file="tokenizer.json", kind="WordPiece", max_length=64, pad_id=0),
        "golden": Golden(
            file="golden.safetensors",
            gradient_tolerance=1e-5,
            loss_tolerance=1e-5,
            scores_tolerance=1e-5,
        ),
        "parity": Parity(
            gate=2e-6, gradient_error=0.0, scores_error=0.0, loss_error=0.0, shapes=((1, 2),)
        ),
        "licences": (Licence(applies_to="documents", licence="CC0-1.0", notice="für alle"),),
    }


def write_bundle_files(folder: Path) -> None:
    (folder / "program.pte").write_bytes(bytes(range(256)) * 8)
    (folder / "tokenizer.json").write_text('{"model": {}}', encoding="utf-8")
    write_theta(
        folder / "theta.safetensors",
        zero_theta(LAYOUT),
        layout=LAYOUT,
        bundle_id=None,
        round_number=0,
    )
    write_lines(
        folder / "documents.jsonl",
        [Document(id=f"d{i}", title=f"Title {i}", text="Straße") for i in range(COUNT)],
    )
    corpus = np.arange(COUNT * WIDTH + WIDTH * RANK, dtype=np.float32)
    save_file(
        {
            "documents": corpus[: COUNT * WIDTH].reshape(COUNT, WIDTH),
            "basis": corpus[COUNT * WIDTH :].reshape(WIDTH, RANK),
        },
        folder / "corpus.safetensors",
    )
    save_file(
        {"expected_loss": np.float32([1.5])},
        folder / "golden.safetensors",
        metadata={"texts": '["héllo"]'},
    )


@pytest.fixture
def layout() -> Layout:
    return LAYOUT


@pytest.fixture
def fields() -> dict[str, Any]:
    return manifest_fields()


@pytest.fixture
def fill() -> Callable[[Path], None]:
    return write_bundle_files


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Writes a bundle; keyword arguments replace manifest fields."""

    def make(name: str = "bundle", **changes: object) -> Bundle:
        destination = tmp_path / name
        with staging_folder(destination) as staging:
            write_bundle_files(staging)
            return finish_bundle(staging, destination, manifest_fields() | changes)

    return make
