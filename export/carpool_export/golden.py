"""One training step that any device can replay, to know whether its runtime is right."""

from __future__ import annotations

import dataclasses

import torch
from tokenizers import Tokenizer
from torch import Tensor

from carpool.data.corpus import Document
from carpool_export.corpus import encode_rows
from carpool_export.parity import random_theta
from carpool_export.reference import Reference, clipped_sum, padded_batch

GRADIENT_TOLERANCE = 1e-4
SCORES_TOLERANCE = 1e-4
EMBED_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4
"""Errors allowed on a device, as shares of the largest expected value. A right runtime on this
processor is within the gate (2e-6). Another processor's kernels add in another order and may
multiply in reduced steps, so the bound is 50 times that; a wrong kernel, mask or weight shows at
1e-2 and above."""

_ROWS = 4
_DOCUMENTS = 16
_SEED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenStep:
    """Inputs and expected results, by the names they have in ``golden.safetensors``."""

    tensors: dict[str, Tensor]
    texts: list[str]


def golden_step(
    reference: Reference,
    tokenizer: Tokenizer,
    documents: list[Document],
    *,
    prompt: str,
    any_catalogue: bool,
    max_batch: int,
) -> GoldenStep:
    """The first documents' titles as queries for the documents that follow them.

    So the losses are far from zero, as is theta: near zero a gradient is a difference of nearly
    equal numbers, and a right runtime would seem wrong.
    The clip bound is below half of the rows' norms, so that clipping is replayed too. The
    expected values come from eager PyTorch and not from the program. Where the program takes
    any catalogue, the step's is the first documents alone: a changed one needs no new step.
    """
    if any_catalogue:
        reference = reference.over(reference.corpus["documents"][:_DOCUMENTS])
    rows = min(_ROWS, max_batch, len(documents))
    texts = [document.title for document in documents[:rows]]
    batch = padded_batch(
        encode_rows(tokenizer, [prompt + text for text in texts]),
        labels=[(row + 1) % len(documents) for row in range(rows)],
        weights=[1 / rows] * rows,
    )
    theta = 0.2 * random_theta(reference.layout.num_values, seed=_SEED)
    losses, gradients = reference.example_gradients(theta, batch)
    bound = 0.9 * float(gradients.norm(dim=1).median())
    with torch.no_grad():
        scores, embeddings = reference.scores(theta, batch), reference.embed(theta, batch)
    return GoldenStep(
        texts=texts,
        tensors={
            "theta": theta,
            **reference.corpus,
            **batch.packed(),
            "labels": batch.labels,
            "example_weights": batch.example_weights,
            "l2_clip_norm": torch.tensor([bound]),
            "expected_loss": (losses * batch.example_weights).sum().reshape(1).float(),
            "expected_gradient": clipped_sum(
                gradients, batch.example_weights, l2_clip_norm=bound
            ).float(),
            "expected_scores": scores.float(),
            "expected_embed": embeddings.float(),
        },
    )
