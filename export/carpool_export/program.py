# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""The step that a device runs, as pure functions: theta goes in, the gradient comes out.

Written for tracing: the backward pass of adapter and head is spelled out, so that per-example
norms come out of it; only the frozen blocks between them are differentiated by autograd.
Shape suffixes: B batch, T tokens, D embedding dimension, N documents, P theta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from carpool_export.model import Encoder
from carpool_export.trainables import Trainables
from carpool_export.trainables.per_example import Direct, row_sum
from carpool_export.trainables.presets import BIAS


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """The program's two methods over one encoder and one set of trainables."""

    encoder: Encoder
    trainables: Trainables

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The frozen inputs that follow theta in both calls."""
        return tuple(self.trainables.frozen_shapes)

    def gradients(self, theta: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the per-example losses, and of their clipped gradients.

        Each example's gradient over all of theta, in theta's own units, is scaled down to norm
        ``l2_clip_norm`` where it is longer, then multiplied by the example's weight and added.

        Guarantees: a row of weight 0 adds exactly nothing, whatever its tokens and label; the
        loss is finite for any finite logits. A label that is no document's index is treated as
        none of them: check labels before the call.

        Args:
            theta: float32, shape ``(P,)``.
            inputs: the frozen ones (``frozen_names``), then ``input_ids`` and ``attention_mask``
                (int64, ``(B, T)``), ``labels`` (int64, ``(B,)``), ``example_weights``
                (float32, ``(B,)``) and ``l2_clip_norm`` (float32, ``(1,)``, positive).

        Returns:
            The loss, float32 ``(1,)``, and the gradient, float32 ``(P,)``.
        """
        count = len(self.frozen_names)
        frozen = dict(zip(self.frozen_names, inputs[:count], strict=True))
        input_ids_BT, mask_BT, labels_B, weights_B, clip_1 = inputs[count:]
        batch = input_ids_BT.shape[0]
        offsets = self._offsets(theta)

        tokens_BTD = self.encoder.token_embeddings(input_ids_BT)
        soft_BTD = self.trainables.adapter.soft_embeddings(offsets, frozen, tokens_BTD)
        soft_BTD = soft_BTD.detach().requires_grad_()
        with torch.set_grad_enabled(bool(self.trainables.adapter.shapes)):
            query_with_graph_BD = self.encoder.embed(soft_BTD, mask_BT)
        query_BD = query_with_graph_BD.detach()
        logits_BN = self._logits(offsets, frozen, query_BD)

        positions_1N = torch.arange(logits_BN.shape[1]).view(1, -1)
        target_BN = (labels_B.view(batch, 1) == positions_1N).to(torch.float32)
        weights_B1 = weights_B.view(batch, 1)
        loss_B1 = -row_sum(torch.log_softmax(logits_BN, dim=-1) * target_BN)
        logits_gradient_BN = torch.softmax(logits_BN, dim=-1) - target_BN
        query_gradient_BD, parts = self.trainables.head.gradients(
            offsets, frozen, query_BD, logits_gradient_BN
        )
        if self.trainables.document_bias:
            parts[BIAS] = Direct(logits_gradient_BN)
        if self.trainables.adapter.shapes:  # else no backward pass through the blocks
            (soft_gradient_BTD,) = torch.autograd.grad(
                query_with_graph_BD, soft_BTD, query_gradient_BD
            )
            parts |= self.trainables.adapter.gradients(
                offsets, frozen, tokens_BTD, soft_gradient_BTD
            )

        scales = {segment.name: segment.scale for segment in self.trainables.layout.segments}
        squared = [parts[name].squared_norms() * scale**2 for name, scale in scales.items()]
        norm_B1 = torch.sqrt(_total(squared))
        clip_11 = clip_1.view(1, 1)
        factor_B1 = weights_B1 * (clip_11 / torch.maximum(norm_B1, clip_11))
        gradient = [parts[name].weighted_sum(factor_B1) * scale for name, scale in scales.items()]
        loss = weights_B1.view(1, batch).mm(loss_B1)
        return loss.view(1), torch.cat(gradient)

    def scores(self, theta: Tensor, *inputs: Tensor) -> Tensor:
        """The logit of every document for every query, float32 ``(B, N)``.

        Args:
            theta: float32, shape ``(P,)``.
            inputs: the frozen ones (``frozen_names``), then ``input_ids`` and ``attention_mask``
                (int64, ``(B, T)``).
        """
        count = len(self.frozen_names)
        frozen = dict(zip(self.frozen_names, inputs[:count], strict=True))
        input_ids_BT, mask_BT = inputs[count:]
        offsets = self._offsets(theta)
        tokens_BTD = self.encoder.token_embeddings(input_ids_BT)
        soft_BTD = self.trainables.adapter.soft_embeddings(offsets, frozen, tokens_BTD)
        query_BD = self.encoder.embed(soft_BTD, mask_BT)
        return self._logits(offsets, frozen, query_BD)

    def _logits(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        logits_BN = self.trainables.head.logits(offsets, frozen, query_BD)
        return logits_BN + offsets[BIAS] if self.trainables.document_bias else logits_BN

    def _offsets(self, theta: Tensor) -> Mapping[str, Tensor]:
        layout = self.trainables.layout
        places = layout.slices()
        return {
            segment.name: theta[places[segment.name]].view(segment.shape) * segment.scale
            for segment in layout.segments
        }


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
