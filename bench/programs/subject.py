"""What all sides do: one training step of a bundle, and what must come out of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.programs.names import L2_CLIP_NORM, Shape
from carpool.bundle import Bundle
from carpool.bundle.manifest import Dimension
from carpool.errors import ConfigError
from carpool_export.model import load_model
from carpool_export.parity import random_batch, random_theta
from carpool_export.reference import Batch, Reference, clipped_sum
from carpool_export.source import ModelSource
from carpool_export.ways_out.folding import exported_source

_Kind = TypeVar("_Kind", bound=Reference)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step: the same tokens, labels, weights and theta for every side.

    Attributes:
        shape: of the batch.
        batch: every row weighs 1 / rows, as on a device, and as Opacus can do it.
        loss: float64, shape ``(1,)``, from eager PyTorch.
        plain: float64, shape of theta: the gradient.
        clipped: the same with each row's gradient clipped to ``L2_CLIP_NORM``.
    """

    shape: Shape
    batch: Batch
    loss: Tensor
    plain: Tensor
    clipped: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A bundle, the model that it was made from, and a theta far from zero everywhere.

    Attributes:
        bundle: opened and checked.
        source: the model's folder, read as the exporter read it.
        corpus: the frozen inputs.
        theta: float32.
    """

    bundle: Bundle
    source: ModelSource
    corpus: dict[str, Tensor]
    theta: Tensor

    @classmethod
    def open(cls, path: Path, *, model: str) -> Self:
        """Opens a bundle and its model.

        Raises:
            CarpoolError: either cannot be used, or the bundle was made from another model.
        """
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        source = exported_source(bundle, model=model, revision=None)
        return cls(
            bundle=bundle,
            source=source,
            corpus={name: torch.from_numpy(array) for name, array in bundle.corpus().items()},
            theta=random_theta(manifest.layout.num_values, seed=0),
        )

    def load(self, *, attention: str) -> PreTrainedModel:
        """The frozen model with one of the library's attentions, without what no step uses."""
        weights = self.bundle.manifest.model.weights
        model = load_model(self.source.folder, attention=attention, weights=weights)
        model.config.use_cache = False
        if hasattr(model, "pooler"):
            setattr(model, "pooler", None)  # noqa: B010  no model declares that it may be None
        return model

    def reference(self, kind: type[_Kind], model: PreTrainedModel) -> _Kind:
        """The step in eager PyTorch over a model."""
        return kind(
            model=model,
            layout=self.bundle.manifest.layout,
            readout=self.source.readout,
            logit_scale=self.bundle.manifest.logit_scale,
            corpus=self.corpus,
        )

    def check(self, shape: Shape) -> None:
        """Refuses a shape that the program cannot take.

        Raises:
            ConfigError: names the bound.
        """
        bounds = self.bundle.manifest.program.methods["gradients"].bounds
        sizes: dict[Dimension, int] = {
            "batch": shape.batch,
            "length": shape.length,
            "tokens": shape.batch * shape.length,
        }
        for name, size in sizes.items():
            if not bounds[name].min <= size <= bounds[name].max:
                raise ConfigError(
                    f"--shapes: {shape}: expected {name} of {bounds[name].min} to "
                    f"{bounds[name].max}, which the program was made for, got {size}."
                )

    def step(self, shape: Shape, *, shortest: float, exact: PreTrainedModel) -> Step:
        """A step of random tokens.

        Args:
            shape: within the program's bounds.
            shortest: the shortest row that may come, as a share of the length; 1 fills all.
            exact: the model in float64.
        """
        batch = random_batch(
            batch=shape.batch,
            length=shape.length,
            shortest=max(1, round(shortest * shape.length)),
            vocabulary=self.source.vocabulary,
            num_documents=self.bundle.manifest.documents.count,
            seed=0,
        )
        batch = dataclasses.replace(
            batch, example_weights=torch.full((shape.batch,), 1 / shape.batch)
        )
        losses, examples = self.reference(Reference, exact).example_gradients(self.theta, batch)
        weights = batch.example_weights.double()
        return Step(
            shape=shape,
            batch=batch,
            loss=(losses * weights).sum().reshape(1),
            plain=(examples * weights[:, None]).sum(0),
            clipped=clipped_sum(examples, weights, l2_clip_norm=L2_CLIP_NORM),
        )
