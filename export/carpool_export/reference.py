"""The same step in plain eager PyTorch: what the exported program is compared with.

Written from the definitions and on purpose apart from ``program.py`` and ``trainables``: the
library's own attention and masks, autograd for everything, and a loop over examples. It computes
in its model's dtype. The gate gives it a float64 model: eager float32 is itself up to 9e-7 of the
largest gradient away from that (seen with MiniLM), half of what the gate lets through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from carpool.packing import pack
from carpool.theta import Layout
from carpool_export.methods import MIN_LENGTH
from carpool_export.model import Readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's inputs.

    Attributes:
        input_ids: int64, shape ``(batch, length)``.
        attention_mask: int64, the same shape; 1 for a token, 0 for padding.
        labels: int64, shape ``(batch,)``: the right documents' indices.
        example_weights: float32, shape ``(batch,)``; 0 for a padding row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    example_weights: Tensor

    def packed(self) -> dict[str, Tensor]:
        """The query's inputs as the program takes them, by name."""
        rows = [
            ids[mask != 0].numpy()
            for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)
        ]
        arrays = pack(rows, min_length=MIN_LENGTH).named()
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def row(self, index: int) -> Batch:
        """A batch of the one row ``index``, with weight 1."""
        only = slice(index, index + 1)
        return Batch(
            input_ids=self.input_ids[only],
            attention_mask=self.attention_mask[only],
            labels=self.labels[only],
            example_weights=torch.ones(1),
        )


def padded_batch(
    rows: Sequence[Sequence[int]], *, labels: Sequence[int], weights: Sequence[float]
) -> Batch:
    """Token ids of each row, its document and its weight, as one rectangle."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=torch.tensor(labels),
        example_weights=torch.tensor(weights),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Loss, gradient and scores by autograd.

    Attributes:
        model: the frozen model with one of the library's own attentions; float32 or
            float64, which is what results come in.
        layout: theta's.
        readout: how token states become an embedding.
        logit_scale: logits per unit of cosine.
        corpus: the frozen inputs, float32.
    """

    model: PreTrainedModel
    layout: Layout
    readout: Readout
    logit_scale: float
    corpus: dict[str, Tensor]

    def over(self, documents: Tensor) -> Reference:
        """The same over another catalogue; for programs that take any.

        Args:
            documents: float32, a row per document.
        """
        layout = self.layout
        if layout.segments[-1].name == "head.bias":
            layout = layout.for_documents(len(documents))
        return dataclasses.replace(
            self, layout=layout, corpus=self.corpus | {"documents": documents}
        )

    def embed(self, theta: Tensor, batch: Batch) -> Tensor:
        """Embeddings, shape ``(batch, D)``; differentiable in theta."""
        return self._embed(self._parameters(theta), batch)

    def scores(self, theta: Tensor, batch: Batch) -> Tensor:
        """Logits, shape ``(batch, documents)``; differentiable in theta."""
        parameter = self._parameters(theta)
        query = self._embed(parameter, batch)
        logits = self.logit_scale * _cosines(query, parameter, self._corpus())
        return logits + parameter["head.bias"] if "head.bias" in parameter else logits

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """The weighted sum of the rows' losses, a scalar; differentiable in theta."""
        losses = functional.cross_entropy(self.scores(theta, batch), batch.labels, reduction="none")
        return (losses * batch.example_weights).sum()

    def _embed(self, parameter: dict[str, Tensor], batch: Batch) -> Tensor:
        """Each row alone and without its padding, of which some models make NaN."""
        rows = [
            self._embed_row(parameter, ids[mask != 0])
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        return torch.stack(rows)

    def _embed_row(self, parameter: dict[str, Tensor], ids: Tensor) -> Tensor:
        soft = self._soft(parameter, ids).unsqueeze(0)
        mask = torch.ones(soft.shape[:2], dtype=torch.int64)
        states = self.model(inputs_embeds=soft, attention_mask=mask).last_hidden_state
        return read_out(states[0], self.readout)

    def _soft(self, parameter: dict[str, Tensor], ids: Tensor) -> Tensor:
        return _adapted(self.model.get_input_embeddings()(ids), parameter, self._corpus())

    def _corpus(self) -> dict[str, Tensor]:
        return {name: values.to(self.model.dtype) for name, values in self.corpus.items()}

    def _parameters(self, theta: Tensor) -> dict[str, Tensor]:
        places = self.layout.slices()
        theta = theta.to(self.model.dtype)
        return {
            segment.name: segment.scale * theta[places[segment.name]].reshape(segment.shape)
            for segment in self.layout.segments
        }

    def plain_gradients(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted loss, shape ``(1,)``, and its gradient: one backward pass, no clipping."""
        variable = theta.to(self.model.dtype, copy=True).requires_grad_()
        loss = self.loss(variable, batch)
        (gradient,) = torch.autograd.grad(loss, variable)
        return loss.detach().reshape(1), gradient

    def example_gradients(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each row's own loss, shape ``(batch,)``, and gradient, ``(batch, values)``; no weights.

        One backward pass per row; rows of weight 0 are left out and stay zero.
        """
        losses = torch.zeros(len(batch.labels), dtype=self.model.dtype)
        gradients = torch.zeros(len(batch.labels), len(theta), dtype=self.model.dtype)
        for index, weight in enumerate(batch.example_weights.tolist()):
            if weight != 0:
                loss, gradients[index] = self.plain_gradients(theta, batch.row(index))
                losses[index] = loss[0]
        return losses, gradients


def read_out(states: Tensor, readout: Readout) -> Tensor:
    """A row's embedding, shape ``(D,)``, from the states of its tokens, ``(T, D)``."""
    return after_pooling(
        {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[readout.pooling], readout
    )


def after_pooling(pooled: Tensor, readout: Readout) -> Tensor:
    """Embeddings, shape ``(..., D)``, from pooled states: dense layers, then the length."""
    for dense in readout.dense:
        bias = None if dense.bias is None else dense.bias.to(pooled.dtype)
        pooled = functional.linear(pooled, dense.weight.to(pooled.dtype), bias)
        pooled = torch.tanh(pooled) if dense.tanh else pooled
    return functional.normalize(pooled, dim=-1) if readout.normalize else pooled


def _adapted(tokens: Tensor, parameter: dict[str, Tensor], corpus: dict[str, Tensor]) -> Tensor:
    identity = torch.eye(tokens.shape[-1], dtype=tokens.dtype)
    if "adapter.weight" in parameter:
        return tokens @ (identity + parameter["adapter.weight"]).T
    if "adapter.up" in parameter:
        down = corpus["adapter_down"] + parameter["adapter.down"]
        return tokens @ (identity + parameter["adapter.up"] @ down.T).T
    if "adapter.scale" in parameter:
        return tokens * (1 + parameter["adapter.scale"]) + parameter["adapter.bias"]
    return tokens


def _cosines(query: Tensor, parameter: dict[str, Tensor], corpus: dict[str, Tensor]) -> Tensor:
    """Before the logit scale; cosines where nothing is trained."""
    documents = corpus["documents"]
    if "head.rows" in parameter:
        return query @ (documents + parameter["head.rows"]).T
    if "head.core" in parameter:
        core = corpus["basis"] @ parameter["head.core"] @ corpus["basis"].T
        return (query + query @ core.T) @ documents.T
    if "head.map" in parameter:
        return (query + query @ parameter["head.map"].T) @ documents.T
    return query @ documents.T


def clipped_sum(gradients: Tensor, weights: Tensor, *, l2_clip_norm: float) -> Tensor:
    """Each row scaled down to at most the bound, times its weight, added.

    All in float64. Abadi et al. (2016), arXiv 1607.00133, Algorithm 1.
    """
    norms = gradients.double().norm(dim=1)
    factors = weights.double() * torch.clamp(l2_clip_norm / norms.clamp(min=1e-300), max=1.0)
    return (factors[:, None] * gradients.double()).sum(0)
