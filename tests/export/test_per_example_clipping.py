"""Norms and clipping against other people's per-example gradients, on a small random BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional

from carpool_export.model import (
    EAGER_ATTENTION,
    PACKED_ATTENTION,
    Packing,
    Readout,
    build_encoder,
    load_model,
)
from carpool_export.program import StepFunctions
from carpool_export.reference import Batch
from carpool_export.trainables import PRESETS, build_trainables
from carpool_export.trainables.per_example import Direct, Outer, TokenOuter

WIDTH, DOCUMENTS, SCALE = 24, 9, 20.0
SCALES = {"adapter.weight": 0.3, "head.rows": 0.7}


class PaperModel(nn.Module):
    """Linear adapter, frozen blocks, row per document, written with Opacus's own layers."""

    def __init__(self, folder: Path, weight: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.blocks = load_model(folder, attention=EAGER_ATTENTION)
        self.adapter = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, DOCUMENTS, bias=False)
        self.adapter.weight.data.copy_(weight)
        self.head.weight.data.copy_(rows)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        states = self.blocks(inputs_embeds=self.adapter(tokens), attention_mask=mask)[0]
        real = mask.unsqueeze(-1).to(states.dtype)
        query = functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
        logits: Tensor = SCALE * self.head(query)
        return logits


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus 1.6's own hooks
@pytest.mark.parametrize("clip", [0.5, 2.0, 1e30])
def test_clipped_sum_equals_that_of_opacus(tiny_model: Path, clip: float) -> None:
    """Opacus's per-sample gradients, clipped by hand jointly over scaled theta, give ours."""
    torch.manual_seed(5)
    trainables = build_trainables(
        PRESETS["paper"], width=WIDTH, num_documents=DOCUMENTS, logit_scale=SCALE, scales=SCALES
    )
    theta = 0.3 * torch.randn(trainables.layout.num_values)
    documents = functional.normalize(torch.randn(DOCUMENTS, WIDTH), dim=-1)
    ids = torch.randint(5, 17, (4, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 6])
    labels, weights = torch.tensor([0, 3, 8, 3]), torch.tensor([0.4, 0.3, 0.2, 0.1])

    offset, rows = theta.split([WIDTH * WIDTH, DOCUMENTS * WIDTH])
    plain = PaperModel(
        tiny_model,
        torch.eye(WIDTH) + SCALES["adapter.weight"] * offset.view(WIDTH, WIDTH),
        documents + SCALES["head.rows"] * rows.view(DOCUMENTS, WIDTH),
    )
    tokens = plain.blocks.get_input_embeddings()(ids)
    sampled = GradSampleModule(plain, loss_reduction="sum", strict=False)
    functional.cross_entropy(sampled(tokens, mask), labels, reduction="sum").backward()
    samples = torch.cat(
        [
            SCALES["adapter.weight"] * plain.adapter.weight.grad_sample.reshape(4, -1),
            SCALES["head.rows"] * plain.head.weight.grad_sample.reshape(4, -1),
        ],
        dim=1,
    )
    norms = samples.norm(dim=1)
    factors = weights * (clip / norms).clamp(max=1.0)
    expected = (factors[:, None] * samples).sum(0)

    encoder = build_encoder(
        load_model(tiny_model, attention=PACKED_ATTENTION),
        load_model(tiny_model, attention=EAGER_ATTENTION),
        Readout(),
    )
    batch = Batch(input_ids=ids, attention_mask=mask, labels=labels, example_weights=weights)
    _, gradient = StepFunctions(encoder=encoder, trainables=trainables).gradients(
        theta, documents, *batch.packed().values(), labels, weights, torch.tensor([clip])
    )
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    if clip == 0.5:
        assert bool((norms > clip).all())


@pytest.mark.parametrize("form", ["direct", "outer", "token_outer"])
def test_norm_and_sum_are_those_of_the_gradients_written_out(form: str) -> None:
    """Each form against the materialised gradients, in float64."""
    torch.manual_seed(6)
    left, right = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    weights = torch.tensor([[0.5], [0.0], [2.0]])
    lengths = (5, 1, 3)
    real = torch.arange(5) < torch.tensor(lengths).view(3, 1)
    slots = torch.where(real, real.flatten().cumsum(0).view(3, 5) - 1, -1)
    packing = Packing(*torch.where(real), slots)
    gradients, ours = {
        "direct": (left[:, 0], Direct(left[:, 0])),
        "outer": (
            torch.einsum("bm,bk->bmk", left[:, 0], right[:, 0]),
            Outer(left[:, 0], right[:, 0]),
        ),
        "token_outer": (
            torch.stack([left[r, :n].T @ right[r, :n] for r, n in enumerate(lengths)]),
            TokenOuter(left[real], right[real], packing),
        ),
    }[form]
    flat = gradients.reshape(3, -1).double()
    expected = (flat**2).sum(1, keepdim=True)
    torch.testing.assert_close(ours.squared_norms().double(), expected, rtol=1e-5, atol=1e-5)
    total = (weights.double() * flat).sum(0)
    torch.testing.assert_close(ours.weighted_sum(weights).double(), total, rtol=1e-5, atol=1e-5)
