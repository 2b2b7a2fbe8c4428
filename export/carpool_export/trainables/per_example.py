# ruff: noqa: N803, N806, N815  shape suffixes: the legend stands in the docstring
"""Per-example gradients in the forms that their norms and weighted sums are cheap in.

Clipping needs each example's gradient norm, then a weighted sum of the gradients. A matrix's
gradient per example would be as large as the matrix; kept as factors, neither the norm nor the
sum needs it (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679, for sums
over tokens: "ghost norms").

Shape suffixes: B batch, T slots of a row, N tokens, M and K a parameter's rows and columns.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from carpool_export.model.packing import Packing
from carpool_export.reductions import row_sum


class PerExample(Protocol):
    """One parameter's gradient for each example of a batch, in parameter units."""

    def squared_norms(self) -> Tensor:
        """The squared L2 norm of each example's gradient, shape ``(B, 1)``."""
        ...

    def weighted_sum(self, weights_B1: Tensor) -> Tensor:
        """The sum of the gradients, each times its weight; flat, in row-major order."""
        ...


@dataclasses.dataclass(frozen=True)
class Direct:
    """A vector's gradients as they are, shape ``(B, K)``."""

    gradients_BK: Tensor

    def squared_norms(self) -> Tensor:
        """See ``PerExample``."""
        return row_sum(self.gradients_BK * self.gradients_BK)

    def weighted_sum(self, weights_B1: Tensor) -> Tensor:
        """See ``PerExample``."""
        return weights_B1.view(1, -1).mm(self.gradients_BK).view(-1)


@dataclasses.dataclass(frozen=True)
class Outer:
    """A matrix's gradients ``left[b] right[b]^T``: norm ``|left[b]| |right[b]|``."""

    left_BM: Tensor
    right_BK: Tensor

    def squared_norms(self) -> Tensor:
        """See ``PerExample``."""
        return row_sum(self.left_BM * self.left_BM) * row_sum(self.right_BK * self.right_BK)

    def weighted_sum(self, weights_B1: Tensor) -> Tensor:
        """See ``PerExample``."""
        return (self.left_BM * weights_B1).t().mm(self.right_BK).reshape(-1)


@dataclasses.dataclass(frozen=True)
class TokenOuter:
    """A matrix's gradients ``sum_n left[n] right[n]^T`` over each row's tokens n.

    The squared norm is the sum of the elementwise product of the two T x T Gram matrices.
    """

    left_NM: Tensor
    right_NK: Tensor
    packing: Packing

    def squared_norms(self) -> Tensor:
        """See ``PerExample``."""
        left_BTM, right_BTK = self.packing.pad(self.left_NM), self.packing.pad(self.right_NK)
        batch, length, _ = left_BTM.shape
        gram_BTT = torch.bmm(left_BTM, left_BTM.transpose(1, 2)) * torch.bmm(
            right_BTK, right_BTK.transpose(1, 2)
        )
        # Summed in two steps: one view to (B, T * T) would need a symbolic product of sizes,
        # which ExecuTorch's emitter does not have (tried on 1.5.1).
        return row_sum(row_sum(gram_BTT).view(batch, length))

    def weighted_sum(self, weights_B1: Tensor) -> Tensor:
        """See ``PerExample``."""
        left_NM = self.left_NM * self.packing.to_tokens(weights_B1)
        return left_NM.t().mm(self.right_NK).reshape(-1)
