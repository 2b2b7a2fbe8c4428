# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""The step that a device runs, as pure functions: theta goes in, the gradient comes out.

Written for tracing: the backward pass of adapter and head is spelled out, so that per-example
norms come out of it; only the frozen blocks between them are differentiated by autograd.
Shape suffixes: B batch, N tokens, D embedding dimension, C documents (the catalogue), P theta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from carpool_export.model import Encoder, Packing
from carpool_export.reductions import row_sum
from carpool_export.trainables import Trainables
from carpool_export.trainables.per_example import Direct
from carpool_export.trainables.presets import BIAS

QUERY_INPUTS = ("token_ids", "token_rows", "token_positions", "slot_tokens")
"""A batch of queries without its padding, as ``carpool.packing`` defines it: int64."""

BATCH_INPUTS = ("labels", "example_weights", "l2_clip_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """The program's methods over one encoder and one set of trainables.

    Each takes tensors in the order of ``inputs_of`` and is free of side effects.
    """

    encoder: Encoder
    trainables: Trainables

    def inputs_of(self, method: str) -> tuple[str, ...]:
        """The method's inputs by name, in the order of the call."""
        head, adapter = self.trainables.head, self.trainables.adapter
        frozen = tuple(head.frozen_shapes | adapter.frozen_shapes)
        return {
            "gradients": ("theta", *frozen, *QUERY_INPUTS, *BATCH_INPUTS),
            "scores": ("theta", *frozen, *QUERY_INPUTS),
            "embed": ("theta", *adapter.frozen_shapes, *QUERY_INPUTS),
        }[method]

    def gradients(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the per-example losses, and of their clipped gradients.

        Each example's gradient over all of theta, in theta's own units, is scaled down to norm
        ``l2_clip_norm`` where it is longer, then multiplied by the example's weight and added.

        Guarantees: a row of weight 0 adds exactly nothing, whatever its tokens and label; the
        loss is finite for any finite logits. A label that is no document's index is treated as
        none of them: check labels before the call.

        Args:
            inputs: theta (float32, ``(P,)``), the frozen ones, the query's
                (``QUERY_INPUTS``), ``labels`` (int64, ``(B,)``), ``example_weights``
                (float32, ``(B,)``) and ``l2_clip_norm`` (float32, ``(1,)``, positive).

        Returns:
            The loss, float32 ``(1,)``, and the gradient, float32 ``(P,)``.
        """
        call = dict(zip(self.inputs_of("gradients"), inputs, strict=True))
        offsets, packing = self._offsets(call), _packing(call)
        batch = call["labels"].shape[0]

        tokens_ND = self.encoder.token_embeddings(call["token_ids"])
        soft_ND = self.trainables.adapter.soft_embeddings(offsets, call, tokens_ND)
        soft_ND = soft_ND.detach().requires_grad_()
        with torch.set_grad_enabled(bool(self.trainables.adapter.shapes)):
            query_with_graph_BD = self.encoder.embed(soft_ND, packing)
        query_BD = query_with_graph_BD.detach()
        logits_BC = self._logits(offsets, call, query_BD)

        positions_1C = torch.arange(logits_BC.shape[1]).view(1, -1)
        target_BC = (call["labels"].view(batch, 1) == positions_1C).to(torch.float32)
        weights_B1 = call["example_weights"].view(batch, 1)
        loss_B1 = -row_sum(torch.log_softmax(logits_BC, dim=-1) * target_BC)
        logits_gradient_BC = torch.softmax(logits_BC, dim=-1) - target_BC
        query_gradient_BD, parts = self.trainables.head.gradients(
            offsets, call, query_BD, logits_gradient_BC
        )
        if self.trainables.document_bias:
            parts[BIAS] = Direct(logits_gradient_BC)
        if self.trainables.adapter.shapes:  # else no backward pass through the blocks
            (soft_gradient_ND,) = torch.autograd.grad(
                query_with_graph_BD, soft_ND, query_gradient_BD
            )
            parts |= self.trainables.adapter.gradients(
                offsets, call, tokens_ND, soft_gradient_ND, packing
            )

        scales = {segment.name: segment.scale for segment in self.trainables.layout.segments}
        squared = [parts[name].squared_norms() * scale**2 for name, scale in scales.items()]
        norm_B1 = torch.sqrt(_total(squared))
        clip_11 = call["l2_clip_norm"].view(1, 1)
        factor_B1 = weights_B1 * (clip_11 / torch.maximum(norm_B1, clip_11))
        gradient = [parts[name].weighted_sum(factor_B1) * scale for name, scale in scales.items()]
        loss = weights_B1.view(1, batch).mm(loss_B1)
        return loss.view(1), torch.cat(gradient)

    def scores(self, *inputs: Tensor) -> Tensor:
        """The logit of every document for every query, float32 ``(B, C)``.

        Args:
            inputs: as for ``gradients``, up to the query's.
        """
        call = dict(zip(self.inputs_of("scores"), inputs, strict=True))
        offsets = self._offsets(call)
        return self._logits(offsets, call, self._query(offsets, call))

    def embed(self, *inputs: Tensor) -> Tensor:
        """The queries' embeddings, of length 1 if the model says so: float32 ``(B, D)``.

        At theta = 0 these are the untrained model's, as a document's embedding is.

        Args:
            inputs: theta (float32, ``(P,)``), the adapter's frozen ones and the query's.
        """
        call = dict(zip(self.inputs_of("embed"), inputs, strict=True))
        return self._query(self._offsets(call), call)

    def _query(self, offsets: Mapping[str, Tensor], call: Mapping[str, Tensor]) -> Tensor:
        tokens_ND = self.encoder.token_embeddings(call["token_ids"])
        soft_ND = self.trainables.adapter.soft_embeddings(offsets, call, tokens_ND)
        return self.encoder.embed(soft_ND, _packing(call))

    def _logits(
        self, offsets: Mapping[str, Tensor], call: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        logits_BC = self.trainables.head.logits(offsets, call, query_BD)
        return logits_BC + offsets[BIAS] if self.trainables.document_bias else logits_BC

    def _offsets(self, call: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        layout, theta = self.trainables.layout, call["theta"]
        places = layout.slices()
        offsets = {}
        for segment in layout.segments:
            if segment.name == BIAS:  # the last one, as long as the catalogue of the call
                values = theta[places[segment.name].start :]
            else:
                values = theta[places[segment.name]].view(segment.shape)
            offsets[segment.name] = values * segment.scale
        return offsets


def _packing(call: Mapping[str, Tensor]) -> Packing:
    return Packing(call["token_rows"], call["token_positions"], call["slot_tokens"])


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
