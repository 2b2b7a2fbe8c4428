# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""The frozen model as a function of packed token embeddings, for any architecture.

The library's own code runs on a batch of one that holds all rows' tokens; what depends on rows
(attention, positions, pooling) is handed to it or done here.

Shape suffixes: B rows, N tokens, D embedding dimension.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from carpool_export.model.attention import attending
from carpool_export.model.packing import Packing
from carpool_export.model.rewrites import rewritten
from carpool_export.reductions import row_sum

DEEP = 12
"""Blocks from which on a model's products are added up in pieces: rounding grows with depth."""

LONGEST_SUM = 96
"""Terms of a piece. With SmolLM2's thirty blocks the gradient then rounds as eager float32's does
(``docs/export.md``), for a few percent of the step."""

Pooling = Literal["mean", "cls", "last"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A layer behind the pooling: ``weight x + bias``, then tanh where there is one.

    Attributes:
        weight: float32, a row per output.
        bias: float32, or None.
        tanh: whether the result goes through tanh.
    """

    weight: Tensor
    bias: Tensor | None
    tanh: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
    """How a row's token states become its embedding.

    Attributes:
        pooling: their mean, the first or the last.
        dense: the layers that follow, in order.
        normalize: whether the result is scaled to length 1.
    """

    pooling: Pooling = "mean"
    dense: tuple[Dense, ...] = ()
    normalize: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Token embeddings, frozen blocks and readout, ready for tracing.

    Attributes:
        model: loaded with ``PACKED_ATTENTION``.
        readout: what follows the blocks.
        state_width: D of a token's last state.
        causal: whether a token sees earlier ones alone.
        first_position: the position id of a row's first token.
        token_types: whether it numbers segments of a text, of which there is one.
    """

    model: PreTrainedModel
    readout: Readout
    state_width: int
    causal: bool = False
    first_position: int = 0
    token_types: bool = False

    @property
    def width(self) -> int:
        """D of the pooled embedding."""
        if self.readout.dense:
            return self.readout.dense[-1].weight.shape[0]
        return self.state_width

    @property
    def longest_sum(self) -> int | None:
        """Terms that a product may add up one after the other; None for any number."""
        blocks = getattr(self.model.config, "num_hidden_layers", 0)
        return LONGEST_SUM if blocks >= DEEP else None

    def token_embeddings(self, token_ids_N: Tensor) -> Tensor:
        """The embedding table's rows, float32 ``(N, D)``: what an adapter changes."""
        table: Tensor = self.model.get_input_embeddings()(token_ids_N)
        return table

    def embed(self, soft_ND: Tensor, packing: Packing) -> Tensor:
        """The pooled embeddings, float32 ``(B, D)``; a row without tokens gives the zero vector."""
        pooled_BD = self._pooling_weights(packing).mm(self.states(soft_ND, packing))
        for dense in self.readout.dense:
            pooled_BD = torch.nn.functional.linear(pooled_BD, dense.weight, dense.bias)
            pooled_BD = torch.tanh(pooled_BD) if dense.tanh else pooled_BD
        if not self.readout.normalize:
            return pooled_BD
        return pooled_BD * torch.rsqrt(row_sum(pooled_BD * pooled_BD) + 1e-24)

    def states(self, soft_ND: Tensor, packing: Packing) -> Tensor:
        """The last block's states of the tokens, float32 ``(N, D)``."""
        tokens = soft_ND.shape[0]
        options: dict[str, object] = {}
        accepted = inspect.signature(self.model.forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        if "position_ids" in accepted:
            positions_N = packing.positions_N
            if self.first_position:
                positions_N = positions_N + self.first_position
            options["position_ids"] = positions_N.view(1, -1)
        if self.token_types:
            options["token_type_ids"] = torch.zeros(1, tokens, dtype=torch.int64)
        with (
            attending(packing, causal=self.causal) as current,
            rewritten(self.model, current),
        ):
            states_1ND: Tensor = self.model(
                inputs_embeds=soft_ND.unsqueeze(0), attention_mask=None, **options
            ).last_hidden_state
        return states_1ND.view(tokens, -1)

    def _pooling_weights(self, packing: Packing) -> Tensor:
        """Each token's share in its row's embedding: float32 ``(B, N)``."""
        if self.readout.pooling == "mean":
            return packing.membership_BN / packing.counts_B1.clamp(min=1.0)
        chosen = packing.positions_N.to(torch.float32).view(1, -1)
        if self.readout.pooling == "last":
            chosen = chosen - (packing.counts_B1 - 1.0)
        return packing.membership_BN * (chosen == 0.0).to(torch.float32)
