# ruff: noqa: N803  shape suffixes: the legend stands in the docstring
"""Adapters: token embeddings in, soft embeddings out, before the frozen blocks.

Shape suffixes: B batch, T tokens, D embedding dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from carpool.bundle import manifest
from carpool_export.trainables.per_example import Direct, PerExample, TokenOuter, token_sum


class Adapter(Protocol):
    """An adapter's forward pass and its hand-written backward pass.

    ``offsets`` are the parameters' distances from their initial values, by segment name: all
    zero is the untrained adapter, which changes nothing.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its segments' names and shapes, in theta's order."""
        ...

    def describe(self) -> manifest.Adapter:
        """Its record in the manifest."""
        ...

    def soft_embeddings(self, offsets: Mapping[str, Tensor], tokens_BTD: Tensor) -> Tensor:
        """What the blocks see instead of the token embeddings; same shape."""
        ...

    def gradients(self, tokens_BTD: Tensor, soft_gradient_BTD: Tensor) -> dict[str, PerExample]:
        """The segments' per-example gradients from that of the soft embeddings."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleBiasAdapter:
    """Soft embedding = (1 + scale) * embedding + bias, per embedding dimension."""

    width: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {"adapter.scale": (self.width,), "adapter.bias": (self.width,)}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.ScaleBiasAdapter()

    def soft_embeddings(self, offsets: Mapping[str, Tensor], tokens_BTD: Tensor) -> Tensor:
        """See ``Adapter``."""
        return tokens_BTD * (1.0 + offsets["adapter.scale"]) + offsets["adapter.bias"]

    def gradients(self, tokens_BTD: Tensor, soft_gradient_BTD: Tensor) -> dict[str, PerExample]:
        """See ``Adapter``."""
        return {
            "adapter.scale": Direct(token_sum(soft_gradient_BTD * tokens_BTD)),
            "adapter.bias": Direct(token_sum(soft_gradient_BTD)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAdapter:
    """Soft embedding = W embedding, W starting at the identity."""

    width: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Adapter``."""
        return {"adapter.weight": (self.width, self.width)}

    def describe(self) -> manifest.Adapter:
        """See ``Adapter``."""
        return manifest.LinearAdapter()

    def soft_embeddings(self, offsets: Mapping[str, Tensor], tokens_BTD: Tensor) -> Tensor:
        """See ``Adapter``."""
        return tokens_BTD + torch.nn.functional.linear(tokens_BTD, offsets["adapter.weight"])

    def gradients(self, tokens_BTD: Tensor, soft_gradient_BTD: Tensor) -> dict[str, PerExample]:
        """See ``Adapter``."""
        return {"adapter.weight": TokenOuter(soft_gradient_BTD, tokens_BTD)}
