# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""Heads: a query's embedding in, a logit per document out; the documents' bias is added later.

Shape suffixes: B batch, D embedding dimension, C documents (the catalogue), R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.nn.functional import linear

from carpool.bundle import manifest
from carpool_export.trainables.per_example import Outer, PerExample


class Head(Protocol):
    """A head's forward pass and its hand-written backward pass.

    ``offsets`` are as in ``Adapter``: all zero gives ``logit_scale`` times the cosine of query
    and document. ``frozen`` holds the program's frozen inputs by name.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its segments' names and shapes, in theta's order."""
        ...

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """The frozen inputs that it takes, in the order of the call."""
        ...

    @property
    def any_catalogue(self) -> bool:
        """Whether its parameters serve any number of documents."""
        ...

    def describe(self, *, document_bias: bool) -> manifest.Head:
        """Its record in the manifest."""
        ...

    def logits(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        """Logits, shape ``(B, C)``."""
        ...

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        query_BD: Tensor,
        logits_gradient_BC: Tensor,
    ) -> tuple[Tensor, dict[str, PerExample]]:
        """The query's gradient, shape ``(B, D)``, and the segments' per-example gradients."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OverDocuments:
    """What every head has: the documents' embeddings, frozen."""

    width: int
    num_documents: int
    logit_scale: float

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return {"documents": (self.num_documents, self.width)}

    @property
    def any_catalogue(self) -> bool:
        """See ``Head``."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoHead(_OverDocuments):
    """Logit = logit_scale * <document, z>: nearest document, nothing is trained."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return {}

    def describe(self, *, document_bias: bool) -> manifest.Head:
        """See ``Head``."""
        return manifest.NoHead(document_bias=document_bias)

    def logits(
        self, _offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        """See ``Head``."""
        return linear(query_BD, frozen["documents"]) * self.logit_scale

    def gradients(
        self,
        _offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        _query_BD: Tensor,
        logits_gradient_BC: Tensor,
    ) -> tuple[Tensor, dict[str, PerExample]]:
        """See ``Head``."""
        return (logits_gradient_BC * self.logit_scale).mm(frozen["documents"]), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapHead(_OverDocuments):
    """Logit = logit_scale * <document, z + M z>, M (D x D) starting at zero."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return {"head.map": (self.width, self.width)}

    def describe(self, *, document_bias: bool) -> manifest.Head:
        """See ``Head``."""
        return manifest.MapHead(document_bias=document_bias)

    def logits(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        """See ``Head``."""
        mapped_BD = query_BD + linear(query_BD, offsets["head.map"])
        return linear(mapped_BD, frozen["documents"]) * self.logit_scale

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        query_BD: Tensor,
        logits_gradient_BC: Tensor,
    ) -> tuple[Tensor, dict[str, PerExample]]:
        """See ``Head``."""
        mapped_gradient_BD = (logits_gradient_BC * self.logit_scale).mm(frozen["documents"])
        query_gradient_BD = mapped_gradient_BD + mapped_gradient_BD.mm(offsets["head.map"])
        return query_gradient_BD, {"head.map": Outer(mapped_gradient_BD, query_BD)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreHead(_OverDocuments):
    """Logit = logit_scale * <document, z + U M U^T z>.

    ``U`` (``basis``, D x R) holds the documents' principal directions, ``M`` (``head.core``) is
    trained.
    """

    rank: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return {"head.core": (self.rank, self.rank)}

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return super().frozen_shapes | {"basis": (self.width, self.rank)}

    def describe(self, *, document_bias: bool) -> manifest.Head:
        """See ``Head``."""
        return manifest.CoreHead(rank=self.rank, document_bias=document_bias)

    def logits(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        """See ``Head``."""
        inside_BR = linear(query_BD.mm(frozen["basis"]), offsets["head.core"])
        mapped_BD = query_BD + linear(inside_BR, frozen["basis"])
        return linear(mapped_BD, frozen["documents"]) * self.logit_scale

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        query_BD: Tensor,
        logits_gradient_BC: Tensor,
    ) -> tuple[Tensor, dict[str, PerExample]]:
        """See ``Head``."""
        mapped_gradient_BD = (logits_gradient_BC * self.logit_scale).mm(frozen["documents"])
        inside_gradient_BR = mapped_gradient_BD.mm(frozen["basis"])
        query_gradient_BD = mapped_gradient_BD + linear(
            inside_gradient_BR.mm(offsets["head.core"]), frozen["basis"]
        )
        return query_gradient_BD, {
            "head.core": Outer(inside_gradient_BR, query_BD.mm(frozen["basis"]))
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsHead(_OverDocuments):
    """Logit = logit_scale * <w_d, z>, a trained row per document, starting at its embedding."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See ``Head``."""
        return {"head.rows": (self.num_documents, self.width)}

    @property
    def any_catalogue(self) -> bool:
        """See ``Head``."""
        return False

    def describe(self, *, document_bias: bool) -> manifest.Head:
        """See ``Head``."""
        return manifest.RowsHead(document_bias=document_bias)

    def logits(
        self, offsets: Mapping[str, Tensor], frozen: Mapping[str, Tensor], query_BD: Tensor
    ) -> Tensor:
        """See ``Head``."""
        rows_CD = frozen["documents"] + offsets["head.rows"]
        return linear(query_BD, rows_CD) * self.logit_scale

    def gradients(
        self,
        offsets: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        query_BD: Tensor,
        logits_gradient_BC: Tensor,
    ) -> tuple[Tensor, dict[str, PerExample]]:
        """See ``Head``."""
        rows_CD = frozen["documents"] + offsets["head.rows"]
        products_gradient_BC = logits_gradient_BC * self.logit_scale
        return products_gradient_BC.mm(rows_CD), {
            "head.rows": Outer(products_gradient_BC, query_BD)
        }
