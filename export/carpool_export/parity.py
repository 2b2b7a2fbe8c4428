"""The finished program against eager PyTorch in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.recipe import PLAIN_GRADIENT_CLIP
from carpool_export.reference import Batch, Reference, clipped_sum
from carpool_export.runner import LoadedProgram

_TRAJECTORY_RATE = 0.1

_THETA_SPREAD = 0.05
"""Standard deviation of the random theta, in its own units: every segment counts."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The largest errors over what was compared, as shares of the largest eager value."""

    gradient: float = 0.0
    scores: float = 0.0
    loss: float = 0.0
    embed: float = 0.0
    trajectory: float = 0.0

    def worst(self, other: Measured) -> Measured:
        """The larger of each."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Measured(*map(max, pairs))


def random_theta(num_values: int, *, seed: int) -> Tensor:
    """A theta that is far from zero in every segment: float32, shape ``(num_values,)``."""
    generator = torch.Generator().manual_seed(seed)
    return _THETA_SPREAD * torch.randn(num_values, generator=generator)


def random_batch(
    *,
    batch: int,
    length: int,
    vocabulary: int,
    num_documents: int,
    seed: int,
    shortest: int = 2,
) -> Batch:
    """Random tokens; rows of different lengths; where there are several, one of weight 0.

    The first row is the longest; the others have ``shortest`` to ``length`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length).view(1, -1) < lengths).to(torch.int64)
    weights = 0.5 + torch.rand(batch, generator=generator)
    if batch > 1:
        weights[-1] = 0.0
    return Batch(
        input_ids=torch.randint(vocabulary, (batch, length), generator=generator) * mask,
        attention_mask=mask,
        labels=torch.randint(num_documents, (batch,), generator=generator),
        example_weights=weights / weights.sum(),
    )


def measure(program: LoadedProgram, reference: Reference, theta: Tensor, batch: Batch) -> Measured:
    """Runs the step plain and clipped, and the scores, and compares each with eager PyTorch.

    The clip bound is 0.9 times the median norm: about half of the rows are clipped.
    """
    values = step_inputs(reference, theta, batch)
    weighted = batch.example_weights
    losses, examples = reference.example_gradients(theta, batch)
    bound = 0.9 * float(examples[weighted != 0].norm(dim=1).median())
    expected_loss = (losses * weighted).sum().reshape(1)
    found = Measured()
    for clip in (PLAIN_GRADIENT_CLIP, bound):
        expected = clipped_sum(examples, weighted, l2_clip_norm=clip)
        loss, gradient = program.call("gradients", step_inputs(reference, theta, batch, clip))
        found = found.worst(
            Measured(
                gradient=relative_error(gradient, expected),
                loss=relative_error(loss, expected_loss, at_least=1.0),
            )
        )
    (scores,) = program.call("scores", values)
    with torch.no_grad():
        expected_scores = reference.scores(theta, batch)
    found = found.worst(Measured(scores=relative_error(scores, expected_scores)))
    return found.worst(measure_embed(program, reference, theta, batch))


def measure_rounding(reference: Reference, theta: Tensor, batch: Batch) -> float:
    """The error of eager PyTorch's plain gradient in float32, as ``measure`` has the program's."""
    single: Any = copy.deepcopy(reference.model)  # its float() has no types
    rounded = dataclasses.replace(reference, model=single.float())
    _, exact = reference.plain_gradients(theta, batch)
    _, found = rounded.plain_gradients(theta, batch)
    return relative_error(found, exact)


def measure_embed(
    program: LoadedProgram, reference: Reference, theta: Tensor, batch: Batch
) -> Measured:
    """Compares the embeddings alone: they are of longer texts, too."""
    (embeddings,) = program.call("embed", step_inputs(reference, theta, batch))
    with torch.no_grad():
        return Measured(embed=relative_error(embeddings, reference.embed(theta, batch)))


def measure_trajectory(
    program: LoadedProgram, reference: Reference, batches: Sequence[Batch]
) -> Measured:
    """Trains both from zero, a clipped step for each batch, and compares where they came to."""
    ours = torch.zeros(reference.layout.num_values)
    exact = ours.double()
    bound = 1.0
    for batch in batches:
        values = step_inputs(reference, ours, batch, bound)
        ours = ours - _TRAJECTORY_RATE * program.call("gradients", values)[1]
        _, examples = reference.example_gradients(exact, batch)
        exact = exact - _TRAJECTORY_RATE * clipped_sum(
            examples, batch.example_weights, l2_clip_norm=bound
        )
    return Measured(trajectory=relative_error(ours, exact))


def step_inputs(
    reference: Reference, theta: Tensor, batch: Batch, clip: float = PLAIN_GRADIENT_CLIP
) -> dict[str, Tensor]:
    """What the program's methods take, by name."""
    return {
        "theta": theta,
        **reference.corpus,
        **batch.packed(),
        "labels": batch.labels,
        "example_weights": batch.example_weights,
        "l2_clip_norm": torch.tensor([clip]),
    }


def relative_error(found: Tensor, expected: Tensor, *, at_least: float = 0.0) -> float:
    """Largest absolute difference as a share of the largest expected value.

    Args:
        found: what the program gave.
        expected: the same shape.
        at_least: smallest value that the difference is divided by.

    Returns:
        Infinity where shapes differ or anything is not finite.
    """
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    largest = max(float(expected.abs().max()), at_least)
    difference = float((found.double() - expected.double()).abs().max())
    return difference / largest if largest > 0 else float("inf" if difference else 0.0)
