"""A small bundle without any model in it: what the contract checks needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.bundle.manifest import (
    CoreHead,
    Dimension,
    Documents,
    Golden,
    Licence,
    Method,
    Parity,
    ParityCase,
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

QUERY = ("token_ids", "token_rows", "token_positions", "slot_tokens")
SCORED = ("theta", "documents", "basis", *QUERY)
SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec(name="theta", dtype="float32", shape=(LAYOUT.num_values,)),
        TensorSpec(name="documents", dtype="float32", shape=("documents", WIDTH)),
        TensorSpec(name="basis", dtype="float32", shape=(WIDTH, RANK)),
        TensorSpec(name="token_ids", dtype="int64", shape=("tokens",)),
        TensorSpec(name="token_rows", dtype="int64", shape=("tokens",)),
        TensorSpec(name="token_positions", dtype="int64", shape=("tokens",)),
        TensorSpec(name="slot_tokens", dtype="int64", shape=("batch", "length")),
        TensorSpec(name="labels", dtype="int64", shape=("batch",)),
        TensorSpec(name="example_weights", dtype="float32", shape=("batch",)),
        TensorSpec(name="l2_clip_norm", dtype="float32", shape=(1,)),
        TensorSpec(name="loss", dtype="float32", shape=(1,)),
        TensorSpec(name="gradient", dtype="float32", shape=(LAYOUT.num_values,)),
        TensorSpec(name="scores", dtype="float32", shape=("batch", "documents")),
        TensorSpec(name="embeddings", dtype="float32", shape=("batch", WIDTH)),
    )
}
BOUNDS: dict[Dimension, Range] = {
    "batch": Range(min=1, max=8),
    "length": Range(min=2, max=64),
    "tokens": Range(min=1, max=512),
    "documents": Range(min=2, max=100),
}


def method(*inputs: str, outputs: Sequence[str]) -> Method:
    """By the names of what goes in and comes out, with bounds of the dimensions in them."""
    used = {size for name in (*inputs, *outputs) for size in SPECS[name].shape}
    return Method(
        bounds={name: bound for name, bound in BOUNDS.items() if name in used},
        inputs=tuple(SPECS[name] for name in inputs),
        outputs=tuple(SPECS[name] for name in outputs),
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
            weights="float32",
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
            prompt="",
            corpus_file="corpus.safetensors",
        ),
        "program": Program(
            file="program.pte",
            packed=None,
            runtime=RuntimeRange(at_least="1.0", below="2.0"),
            values_per_document=0,
            methods={
                "gradients": method(
                    *SCORED,
                    "labels",
                    "example_weights",
                    "l2_clip_norm",
                    outputs=("loss", "gradient"),
                ),
                "scores": method(*SCORED, outputs=("scores",)),
                "embed": method("theta", *QUERY, outputs=("embeddings",)),
            },
        ),
        "tokenizer": Tokenizer(
            file="tokenizer.json", kind="WordPiece", query_prompt="", max_length=64
        ),
        "golden": Golden(
            file="golden.safetensors",
            gradient_tolerance=1e-5,
            loss_tolerance=1e-5,
            scores_tolerance=1e-5,
            embed_tolerance=1e-5,
        ),
        "parity": Parity(
            gate=2e-6,
            gradient_error=0.0,
            scores_error=0.0,
            loss_error=0.0,
            embed_error=0.0,
            trajectory_error=0.0,
            trajectory_steps=20,
            cases=(
                ParityCase(
                    batch=1,
                    length=2,
                    documents=7,
                    gradient_error=0.0,
                    eager_float32_error=None,
                ),
            ),
        ),
        "licences": (
            Licence(applies_to="documents", licence="CC0-1.0", revision=None, notice="für alle"),
        ),
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
