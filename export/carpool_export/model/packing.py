# ruff: noqa: N802, N803, N806, N815  shape suffixes: the legend stands in the docstring
"""A batch without its padding: the real tokens of all rows, one after the other.

Everything in a transformer but attention treats each token alone, and in a batch of queries a
third of the rectangle is padding. So the blocks run on the N real tokens, and only attention
sees rows of T slots. Moving between the two is a gather by an index in either direction, and
each gather is the other's derivative; heads move to their own dimension in the same step.

Shape suffixes: B rows, T slots of a row, N tokens, H heads, K a head's dimension, G groups of
heads, S = T times the heads of a group, D any width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from carpool_export.reductions import row_sum


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Which token stands in which slot of which row.

    Guarantees of a right packing: ``slots_BT[rows_N[n], positions_N[n]] == n`` for every token.

    Attributes:
        rows_N: int64, each token's row.
        positions_N: int64, its place in that row.
        slots_BT: int64, the token of each slot, -1 for padding.
    """

    rows_N: Tensor
    positions_N: Tensor
    slots_BT: Tensor

    @functools.cached_property
    def mask_BT(self) -> Tensor:
        """Float32: 1 where there is a token, 0 for padding."""
        return (self.slots_BT >= 0).to(torch.float32)

    @functools.cached_property
    def membership_BN(self) -> Tensor:
        """Float32: 1 where the token is the row's."""
        batch = self.slots_BT.shape[0]
        return (torch.arange(batch).view(batch, 1) == self.rows_N.view(1, -1)).to(torch.float32)

    @functools.cached_property
    def counts_B1(self) -> Tensor:
        """Float32: each row's tokens."""
        return row_sum(self.mask_BT)

    @functools.cached_property
    def _tokens_BT(self) -> Tensor:
        """The token of each slot; padding shows the first, whose values nothing may use."""
        return self.slots_BT.clamp(min=0)

    def row_sums(self, values_ND: Tensor) -> Tensor:
        """The sum over each row's tokens, shape ``(B, D)``."""
        return self.membership_BN.mm(values_ND)

    def to_tokens(self, values_B1: Tensor) -> Tensor:
        """Each token's row's value, shape ``(N, 1)``."""
        return torch.nn.functional.embedding(self.rows_N, values_B1)

    def pad(self, values_ND: Tensor) -> Tensor:
        """Rows of slots, shape ``(B, T, D)``; padding is zero."""
        batch, length = self.slots_BT.shape
        padded_BTD = torch.nn.functional.embedding(self._tokens_BT, values_ND)
        return padded_BTD * self.mask_BT.view(batch, length, 1)

    def split_heads(self, values_NHK: Tensor, *, groups: int) -> Tensor:
        """Rows of slots for each head; padding holds some token's values.

        Heads that share a key (grouped-query attention) follow each other in one dimension: the
        result is ``(B, groups, (H / groups) * T, K)``, and ``(B, H, T, K)`` where nothing is
        shared. Its derivative takes the slots of tokens alone: what is computed from the result
        must not depend on padding.
        """
        heads = values_NHK.shape[1]
        result: Tensor = _SplitHeads.apply(  # type: ignore[no-untyped-call]
            values_NHK, self._slot_index(heads, groups), self._place(heads)
        )
        return result

    def merge_heads(self, values_BGSK: Tensor, *, heads: int) -> Tensor:
        """The tokens' values, shape ``(N, H, K)``: the inverse of ``split_heads``."""
        batch, length = self.slots_BT.shape
        groups = values_BGSK.shape[1]
        mask_B1S1 = self.mask_BT.view(batch, 1, length, 1)
        result: Tensor = _MergeHeads.apply(  # type: ignore[no-untyped-call]
            values_BGSK,
            self._slot_index(heads, groups),
            self._place(heads),
            repeat_slots(mask_B1S1, heads // groups),
        )
        return result

    def _slot_index(self, heads: int, groups: int) -> Tensor:
        """Where a slot's head stands among the tokens' heads: int64, ``(B, groups, S)``."""
        batch, length = self.slots_BT.shape
        index_BHT = self._tokens_BT.view(batch, 1, length) * heads
        index_BHT = index_BHT + torch.arange(heads).view(1, heads, 1)
        return index_BHT.view(batch, groups, heads // groups * length)

    def _place(self, heads: int) -> Tensor:
        """Where a token's head stands among the slots' heads: int64, ``(N, H)``."""
        length = self.slots_BT.shape[1]
        head_NH = self.rows_N.view(-1, 1) * heads + torch.arange(heads).view(1, heads)
        # as a tensor: a product with a bare size would be of mixed types
        length_11 = torch.full((1, 1), length, dtype=torch.int64)
        return head_NH * length_11 + self.positions_N.view(-1, 1)


def repeat_slots(values_B1TK: Tensor, times: int) -> Tensor:
    """The slots' values once for each head of a group: ``(B, 1, times * T, K)``."""
    return torch.cat([values_B1TK] * times, dim=2) if times > 1 else values_B1TK


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows of the last dimension by their place: the embedding kernel copies whole rows."""
    return torch.nn.functional.embedding(index, values.reshape(-1, values.shape[-1]))


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NHK: Tensor, slot_BGS: Tensor, place_NH: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(place_NH)
        return _gather(values_NHK, slot_BGS)

    @staticmethod
    def backward(ctx: Any, gradient_BGSK: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (place_NH,) = ctx.saved_tensors
        return _gather(gradient_BGSK, place_NH), None, None


class _MergeHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        values_BGSK: Tensor,
        slot_BGS: Tensor,
        place_NH: Tensor,
        mask_B1S1: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(slot_BGS, mask_B1S1)
        return _gather(values_BGSK, place_NH)

    @staticmethod
    def backward(ctx: Any, gradient_NHK: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        slot_BGS, mask_B1S1 = ctx.saved_tensors
        return _gather(gradient_NHK, slot_BGS) * mask_B1S1, None, None, None
