"""The step as plain modules with theta's segments as their parameters.

Opacus and ExecuTorch's own training export want modules. Parameters are in theta's units: a
segment's scale stands in the forward pass, so gradients and their norms are theta's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bench.programs.peers.eager import embed_padded
from bench.programs.subject import Subject


class Scale(nn.Module):
    """``x * (1 + scale * values)``, per last dimension."""

    def __init__(self, values: Tensor, *, scale: float) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape as the inputs'."""
        return inputs * (1 + self.scale * self.values)


class Shift(nn.Module):
    """``x + scale * values``, per last dimension."""

    def __init__(self, values: Tensor, *, scale: float) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape as the inputs'."""
        return inputs + self.scale * self.values


class StepModule(nn.Module):
    """Token ids in, the mean loss out; every segment of theta is a parameter of one leaf."""

    def __init__(self, subject: Subject, model: PreTrainedModel) -> None:
        super().__init__()
        manifest = subject.bundle.manifest
        self.model = model
        self.readout = subject.source.readout
        self.logit_scale = manifest.logit_scale
        self.corpus = subject.corpus
        self.scales = {segment.name: segment.scale for segment in manifest.layout.segments}
        places = manifest.layout.slices()
        self.leaves: dict[str, nn.Module] = {}
        for segment in manifest.layout.segments:
            values = subject.theta[places[segment.name]].reshape(segment.shape).clone()
            leaf = _leaf(segment.name, values, scale=segment.scale)
            self.leaves[segment.name] = leaf
            self.add_module(segment.name.replace(".", "_"), leaf)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The rows' mean loss, a scalar.

        Args:
            input_ids: int64, shape ``(B, T)``.
            attention_mask: int64, the same shape; 1 for a token.
            labels: int64, shape ``(B,)``.
        """
        soft = self._adapted(self.model.get_input_embeddings()(input_ids))
        query = embed_padded(self.model, soft, attention_mask, self.readout)
        return functional.cross_entropy(self._logits(query), labels)

    def flat(self, gradients: dict[str, Tensor]) -> Tensor:
        """Gradients by segment, each as its parameter is shaped, as theta lists them."""
        return torch.cat(
            [
                (gradients[name].T if name == "adapter.down" else gradients[name]).reshape(-1)
                for name in self.leaves
            ]
        )

    def parameter(self, name: str) -> nn.Parameter:
        """A segment's."""
        (parameter,) = self.leaves[name].parameters()
        return parameter

    def _scaled(self, name: str, inputs: Tensor) -> Tensor:
        product: Tensor = self.leaves[name](inputs)
        return self.scales[name] * product

    def _adapted(self, tokens: Tensor) -> Tensor:
        if "adapter.weight" in self.leaves:
            return tokens + self._scaled("adapter.weight", tokens)
        if "adapter.up" in self.leaves:
            inside = tokens @ self.corpus["adapter_down"] + self._scaled("adapter.down", tokens)
            return tokens + self._scaled("adapter.up", inside)
        if "adapter.scale" in self.leaves:
            soft: Tensor = self.leaves["adapter.bias"](self.leaves["adapter.scale"](tokens))
            return soft
        return tokens

    def _logits(self, query: Tensor) -> Tensor:
        documents = self.corpus["documents"]
        if "head.map" in self.leaves:
            query = query + self._scaled("head.map", query)
        elif "head.core" in self.leaves:
            basis = self.corpus["basis"]
            query = query + self._scaled("head.core", query @ basis) @ basis.T
        products = query @ documents.T
        if "head.rows" in self.leaves:
            products = products + self._scaled("head.rows", query)
        logits = self.logit_scale * products
        if "head.bias" in self.leaves:
            logits = self.leaves["head.bias"](logits)
        return logits


def _leaf(name: str, values: Tensor, *, scale: float) -> nn.Module:
    if name == "adapter.scale":
        return Scale(values, scale=scale)
    if name in {"adapter.bias", "head.bias"}:
        return Shift(values, scale=scale)
    matrix = values.T.contiguous() if name == "adapter.down" else values
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix)
    return linear
