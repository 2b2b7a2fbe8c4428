"""A bundle that takes seconds to make: a bag of embeddings with gradients written out by hand.

It has the interface of a real bundle, so tests of order, arithmetic, checks, search and
evaluation need no export of a language model. Its eager functions are the reference.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from carpool.bundle import Bundle, finish_bundle, staging_folder
from carpool.data.corpus import Document, write_lines
from carpool.theta import Layout, Segment, write_theta, zero_theta

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "stone")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
WIDTH = 8
LOGIT_SCALE = 20.0
DOCUMENTS = [
    Document(id="d-red", title="red cat", text="sleeps"),
    Document(id="d-green", title="green dog", text="runs"),
    Document(id="d-blue", title="blue bird", text="eats"),
    Document(id="d-stone", title="stone", text=""),
    Document(id="d-dog", title="dog", text="eats red bird"),
]
LAYOUT = Layout(
    segments=(
        Segment(name="adapter.bias", group="adapter", shape=(WIDTH,), scale=0.5),
        Segment(name="head.bias", group="head", shape=(len(DOCUMENTS),), scale=1.0),
    )
)
MAX_BATCH, MAX_LENGTH = 4, 12


class TinyModel:
    """z = mean of token embeddings + adapter bias; score = <d, z> + document bias."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.embeddings = torch.randn(len(VOCABULARY), WIDTH, generator=generator)
        self.documents = torch.nn.functional.normalize(
            torch.stack([self._bag(d.passage) for d in DOCUMENTS])
        )

    def _bag(self, text: str) -> torch.Tensor:
        ids = [VOCABULARY.index(w) for w in text.replace(".", " ").split()]
        return self.embeddings[torch.tensor(ids)].mean(0)

    def split(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter's bias and the documents' biases."""
        return 0.5 * theta[:WIDTH], theta[WIDTH:]


class Scores(torch.nn.Module):
    """The method ``scores``."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("embeddings", model.embeddings)

    def pooled(self, ids: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Mean of each row's tokens' embeddings: float32, shape ``(B, WIDTH)``."""
        batch = slots.shape[0]
        member = (torch.arange(batch).unsqueeze(1) == rows.unsqueeze(0)).to(torch.float32)
        return (member @ self.embeddings[ids]) / member.sum(1, keepdim=True)

    def forward(
        self,
        theta: torch.Tensor,
        documents: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        _positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Scores: float32, shape ``(B, N)``."""
        adapter, head = self.model.split(theta)
        return (self.pooled(ids, rows, slots) + adapter) @ documents.t() + head


class Embed(Scores):
    """The method ``embed``."""

    def forward(  # type: ignore[override]
        self,
        theta: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        _positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Embeddings: float32, shape ``(B, WIDTH)``."""
        return self.pooled(ids, rows, slots) + self.model.split(theta)[0]


class Gradients(Scores):
    """The method ``gradients``, with per-example clipping."""

    def forward(  # type: ignore[override]  # noqa: PLR0917  a program's inputs have places
        self,
        theta: torch.Tensor,
        documents: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        clip: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and the flat gradient, written out by hand."""
        scores = super().forward(theta, documents, ids, rows, positions, slots)
        probabilities = torch.softmax(LOGIT_SCALE * scores, dim=1)
        places = torch.arange(len(DOCUMENTS)).unsqueeze(0)
        right = (places == labels.unsqueeze(1)).to(torch.float32)
        losses = -torch.log((probabilities * right).sum(1) + 1e-30)
        head = LOGIT_SCALE * (probabilities - right)
        each = torch.cat([0.5 * (head @ documents), head], dim=1)
        norms = torch.sqrt((each * each).sum(1) + 1e-30)
        factors = torch.clamp(clip / norms, max=1.0) * weights
        return (losses * weights).sum(), (each * factors.unsqueeze(1)).sum(0)


def packed(rows: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """The query's inputs, by hand: ids, their rows, their places and the slots."""
    length = max(2, *(len(row) for row in rows))
    ids, owners, places, slots = [], [], [], []
    for number, row in enumerate(rows):
        slots.append([len(ids) + i for i in range(len(row))] + [-1] * (length - len(row)))
        ids += row
        owners += [number] * len(row)
        places += range(len(row))
    return tuple(torch.tensor(part) for part in (ids, owners, places, slots))


def example_inputs() -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(LAYOUT.num_values),
        TinyModel().documents,
        *packed([[4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 4]]),
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), 1 / 3),
        torch.tensor([1e30]),
    )


def program_bytes(*names: str) -> bytes:
    """The named methods, or all; dynamic in batch, length and tokens, on portable kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge  # noqa: PLC0415

        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        length = torch.export.Dim("length", min=2, max=MAX_LENGTH)
        tokens = torch.export.Dim("tokens", min=1, max=MAX_BATCH * MAX_LENGTH)
        of_tokens = {0: tokens}
        query = (of_tokens, of_tokens, of_tokens, {0: batch, 1: length})
        inputs = example_inputs()
        shapes = (None, None, *query, {0: batch}, {0: batch}, None)
        model = TinyModel()
        calls = {
            "gradients": (Gradients(model), inputs, shapes),
            "scores": (Scores(model), inputs[:6], shapes[:6]),
            "embed": (Embed(model), (inputs[0], *inputs[2:6]), (None, *query)),
        }
        programs = {
            name: torch.export.export(module, given, dynamic_shapes=sizes)
            for name, (module, given, sizes) in calls.items()
            if name in (names or calls)
        }
        return bytes(to_edge(programs).to_executorch().buffer)


def tokenizer_json() -> str:
    """A WordPiece tokenizer with BERT's template, and truncation that must not be obeyed."""
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


def _specs(*names: str) -> list[dict[str, Any]]:
    shapes = {
        "theta": ("float32", (LAYOUT.num_values,)),
        "documents": ("float32", (len(DOCUMENTS), WIDTH)),
        "token_ids": ("int64", ("tokens",)),
        "token_rows": ("int64", ("tokens",)),
        "token_positions": ("int64", ("tokens",)),
        "slot_tokens": ("int64", ("batch", "length")),
        "labels": ("int64", ("batch",)),
        "example_weights": ("float32", ("batch",)),
        "l2_clip_norm": ("float32", (1,)),
        "loss": ("float32", ()),
        "gradient": ("float32", (LAYOUT.num_values,)),
        "scores": ("float32", ("batch", len(DOCUMENTS))),
        "embeddings": ("float32", ("batch", WIDTH)),
    }
    return [{"name": n, "dtype": shapes[n][0], "shape": shapes[n][1]} for n in names]


def manifest_fields() -> dict[str, Any]:
    """What ``finish_bundle`` needs, for tests to change."""
    query = ("token_ids", "token_rows", "token_positions", "slot_tokens")
    scored = ("theta", "documents", *query)
    bounds = {
        "batch": {"min": 1, "max": MAX_BATCH},
        "length": {"min": 2, "max": MAX_LENGTH},
        "tokens": {"min": 1, "max": MAX_BATCH * MAX_LENGTH},
    }
    return {
        "carpool_version": "0.1.0",
        "preset": "tiny",
        "model": {
            "name": "tiny",
            "architecture": "bag",
            "hidden_size": WIDTH,
            "pooling": "mean",
            "normalize": False,
            "weights": "float32",
            "weights_sha256": "0" * 64,
        },
        "adapter": {"kind": "scale-bias"},
        "head": {"kind": "rows", "document_bias": True},
        "logit_scale": LOGIT_SCALE,
        "layout": LAYOUT,
        "theta_file": "theta.safetensors",
        "documents": {
            "file": "documents.jsonl",
            "count": len(DOCUMENTS),
            "embedding_length": 12,
            "prompt": "",
            "corpus_file": "corpus.safetensors",
        },
        "program": {
            "file": "program.pte",
            "packed": None,
            "runtime": {"at_least": "1.5.1", "below": "1.6"},
            "values_per_document": 0,
            "methods": {
                "gradients": {
                    "bounds": bounds,
                    "inputs": _specs(*scored, "labels", "example_weights", "l2_clip_norm"),
                    "outputs": _specs("loss", "gradient"),
                },
                "scores": {
                    "bounds": bounds,
                    "inputs": _specs(*scored),
                    "outputs": _specs("scores"),
                },
                "embed": {
                    "bounds": bounds,
                    "inputs": _specs("theta", *query),
                    "outputs": _specs("embeddings"),
                },
            },
        },
        "tokenizer": {
            "file": "tokenizer.json",
            "kind": "WordPiece",
            "max_length": MAX_LENGTH,
            "query_prompt": "",
        },
        "golden": {
            "file": "golden.safetensors",
            "gradient_tolerance": 1e-5,
            "loss_tolerance": 1e-5,
            "scores_tolerance": 1e-5,
            "embed_tolerance": 1e-5,
        },
        "parity": {
            "gate": 1e-5,
            "gradient_error": 0.0,
            "scores_error": 0.0,
            "loss_error": 0.0,
            "embed_error": 0.0,
            "trajectory_error": 0.0,
            "trajectory_steps": 20,
            "cases": [],
        },
        "licences": [],
    }


def golden_step() -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
    """One step by the eager model, token ids written by hand."""
    texts = ["red cat sleeps", "stone"]
    query = packed([[2, 4, 7, 11, 3], [2, 13, 3]])
    theta = torch.linspace(-0.2, 0.2, LAYOUT.num_values)
    labels, weights = torch.tensor([0, 3]), torch.tensor([0.5, 0.5])
    clip = torch.tensor([2.0])
    model = TinyModel()
    loss, gradient = Gradients(model)(theta, model.documents, *query, labels, weights, clip)
    names = ("token_ids", "token_rows", "token_positions", "slot_tokens")
    return {
        "theta": theta.numpy(),
        "documents": model.documents.numpy(),
        **{name: part.numpy() for name, part in zip(names, query, strict=True)},
        "labels": labels.numpy(),
        "example_weights": weights.numpy(),
        "l2_clip_norm": clip.numpy(),
        "expected_loss": loss.reshape(1).numpy(),
        "expected_gradient": gradient.numpy(),
        "expected_scores": Scores(model)(theta, model.documents, *query).numpy(),
        "expected_embed": Embed(model)(theta, *query).numpy(),
    }, texts


def write_tiny_bundle(destination: Path, program: bytes, /, **changes: Any) -> Bundle:  # noqa: ANN401
    """A bundle at ``destination``; ``changes`` replace fields of its manifest."""
    with staging_folder(destination) as staging:
        (staging / "program.pte").write_bytes(program)
        (staging / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        write_lines(staging / "documents.jsonl", DOCUMENTS)
        save_file({"documents": TinyModel().documents.numpy()}, staging / "corpus.safetensors")
        arrays, texts = golden_step()
        save_file(arrays, staging / "golden.safetensors", metadata={"texts": json.dumps(texts)})
        write_theta(
            staging / "theta.safetensors",
            zero_theta(LAYOUT),
            layout=LAYOUT,
            bundle_id=None,
            round_number=0,
        )
        return finish_bundle(staging, destination, manifest_fields() | changes)
