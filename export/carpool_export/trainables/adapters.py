# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""Adapters: token embeddings in, soft embeddings out, before the frozen blocks.

Shape suffixes: N tokens, D embedding dimension, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from carpool.bundle import manifest
from carpool_export.model.packing import Packing
from carpool_export.trainables.per_example import Direct, PerExample, TokenOuter


class Adapter(Protocol):
    """An adapter's forward pass and its hand-written backward pass.

    ``offsets`` are the parameters' distances from their initial values, by segment name: all
    zero is the untrained adapter, which changes nothing. ``frozen`` holds the program's frozen
    inputs by name.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its segments' names and shapes, in theta's order."""
        ...

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """The frozen inputs that it takes, by name."""
        ...

    def describe(self) -> manifest.Adapter:
        """Its record in the manifest."""
        ...

    def soft_embeddings(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], tokens_ND: Tensor
    ) -> Tensor:
        """What the blocks see instead of the token embeddings; same shape."""
        ...

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        tokens_ND: Tensor,
        soft_gradient_ND: Tensor,
        packing: Packing,
    ) -> dict[str, PerExample]:
        """The segments' per-example gradients from that of the soft embeddings."""
        ...


class _WithoutFrozenInputs:
    """Of an adapter whose initial values are constants."""

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAdapter(_WithoutFrozenInputs):
    """Soft embedding = embedding: nothing is trained before the blocks."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.NoAdapter()

    def soft_embeddings(
        self, _offsets: Mapping[str, Tensor], _frozen: Mapping[str, Tensor], tokens_ND: Tensor
    ) -> Tensor:
        """See ``Adapter``."""
        return tokens_ND

    def gradients(
        self,
        _offsets: Mapping[str, Tensor],
        _frozen: Mapping[str, Tensor],
        _tokens_ND: Tensor,
        _soft_gradient_ND: Tensor,
        _packing: Packing,
    ) -> dict[str, PerExample]:
        """See ``Adapter``."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleBiasAdapter(_WithoutFrozenInputs):
    """Soft embedding = (1 + scale) * embedding + bias, per embedding dimension."""

    width: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {"adapter.scale": (self.width,), "adapter.bias": (self.width,)}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.ScaleBiasAdapter()

    def soft_embeddings(
        self, offsets: Mapping[str, Tensor], _frozen: Mapping[str, Tensor], tokens_ND: Tensor
    ) -> Tensor:
        """See ``Adapter``."""
        return tokens_ND * (1.0 + offsets["adapter.scale"]) + offsets["adapter.bias"]

    def gradients(
        self,
        _offsets: Mapping[str, Tensor],
        _frozen: Mapping[str, Tensor],
        tokens_ND: Tensor,
        soft_gradient_ND: Tensor,
        packing: Packing,
    ) -> dict[str, PerExample]:
        """See ``Adapter``."""
        return {
            "adapter.scale": Direct(packing.row_sums(soft_gradient_ND * tokens_ND)),
            "adapter.bias": Direct(packing.row_sums(soft_gradient_ND)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAdapter(_WithoutFrozenInputs):
    """Soft embedding = W embedding, W starting at the identity."""

    width: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {"adapter.weight": (self.width, self.width)}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.LinearAdapter()

    def soft_embeddings(
        self, offsets: Mapping[str, Tensor], _frozen: Mapping[str, Tensor], tokens_ND: Tensor
    ) -> Tensor:
        """See ``Adapter``."""
        return tokens_ND + torch.nn.functional.linear(tokens_ND, offsets["adapter.weight"])

    def gradients(
        self,
        _offsets: Mapping[str, Tensor],
        _frozen: Mapping[str, Tensor],
        tokens_ND: Tensor,
        soft_gradient_ND: Tensor,
        packing: Packing,
    ) -> dict[str, PerExample]:
        """See ``Adapter``."""
        return {"adapter.weight": TokenOuter(soft_gradient_ND, tokens_ND, packing)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankAdapter:
    """Soft embedding = embedding + up (down^T embedding), both D x R, up starting at zero.

    ``down`` starts at the frozen input ``adapter_down``.
    """

    width: int
    rank: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {
            "adapter.down": (self.width, self.rank),
            "adapter.up": (self.width, self.rank),
        }

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {"adapter_down": (self.width, self.rank)}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.LowRankAdapter(rank=self.rank)

    def soft_embeddings(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], tokens_ND: Tensor
    ) -> Tensor:
        """See ``Adapter``."""
        inside_NR = tokens_ND.mm(frozen["adapter_down"] + offsets["adapter.down"])
        return tokens_ND + torch.nn.functional.linear(inside_NR, offsets["adapter.up"])

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        tokens_ND: Tensor,
        soft_gradient_ND: Tensor,
        packing: Packing,
    ) -> dict[str, PerExample]:
        """See ``Adapter``."""
        inside_NR = tokens_ND.mm(frozen["adapter_down"] + offsets["adapter.down"])
        inside_gradient_NR = soft_gradient_ND.mm(offsets["adapter.up"])
        return {
            "adapter.down": TokenOuter(tokens_ND, inside_gradient_NR, packing),
            "adapter.up": TokenOuter(soft_gradient_ND, inside_NR, packing),
        }
