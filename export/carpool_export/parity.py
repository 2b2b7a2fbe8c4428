"""The gate: the finished program against eager PyTorch in float64, before a bundle is written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.errors import ParityError
from carpool.recipe import PLAIN_GRADIENT_CLIP
from carpool_export.gate_texts import GateTexts
from carpool_export.methods import MIN_LENGTH
from carpool_export.reference import Batch, Reference, clipped_sum
from carpool_export.runner import LoadedProgram

GRADIENT_GATE = 2e-6
"""Largest gradient error let through, as a share of the largest eager gradient: 17 float32
roundings (2**-23) of that value."""

ROUNDING_FACTOR = 10.0
ROUNDING_CEILING = 5e-5
"""Where a gradient's error is above its gate, it may be this many times the error that eager
PyTorch in float32 has in the same place, up to this share. A deep model at few tokens is that ill
conditioned: on SmolLM2-135M with a row of two tokens eager float32 itself is up to 7e-6 off.
XNNPACK's products add one value after the other, where eager's add in several parts, hence the
factor: eager whose products add like that is off by as much. A fault shows at 1e-4 and above."""

SCORES_GATE = 5e-6
"""Likewise for scores, of the largest eager score. Wider, because two float32 embeddings that
agree to a few roundings are multiplied with documents and only then compared."""

EMBED_GATE = 5e-6
"""Likewise for embeddings."""

LOSS_GATE = 5e-6
"""Likewise for the loss, of the larger of 1 and the eager loss: a difference of two logits."""

TRAJECTORY_GATE = 2e-5
"""Likewise for theta after training steps, of the longest way that a value of it went: each step
takes its gradient where the last one's error led, so errors add up and may grow."""

TRAJECTORY_STEPS = 20
_TRAJECTORY_RATE = 0.1
_TRAJECTORY_SHAPE = (2, 16)

_THETA_SPREAD = 0.05
"""Standard deviation of the random theta, in its own units: every segment counts."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The largest errors over what was compared, as shares of the largest eager value.

    ``rounding`` is eager float32's own, of the gradient, where it was asked for.
    """

    gradient: float = 0.0
    scores: float = 0.0
    loss: float = 0.0
    embed: float = 0.0
    trajectory: float = 0.0
    rounding: float = 0.0

    def worst(self, other: Measured) -> Measured:
        """The larger of each."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Measured(*map(max, pairs))


def gate_shapes(*, max_batch: int, max_length: int) -> list[tuple[int, int]]:
    """(batch, length) pairs over the whole range: corners, odd sizes, and the usual one."""
    wished = [(1, 2), (1, max_length), (3, 17), (5, 33), (max_batch, 32), (max_batch, max_length)]
    inside = [(min(batch, max_batch), min(length, max_length)) for batch, length in wished]
    return list(dict.fromkeys(inside))


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
    values = _inputs(reference, theta, batch)
    weighted = batch.example_weights
    losses, examples = reference.example_gradients(theta, batch)
    bound = 0.9 * float(examples[weighted != 0].norm(dim=1).median())
    expected_loss = (losses * weighted).sum().reshape(1)
    found = Measured()
    for clip in (PLAIN_GRADIENT_CLIP, bound):
        expected = clipped_sum(examples, weighted, l2_clip_norm=clip)
        loss, gradient = program.call("gradients", _inputs(reference, theta, batch, clip))
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
    (embeddings,) = program.call("embed", _inputs(reference, theta, batch))
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
        values = _inputs(reference, ours, batch, bound)
        ours = ours - _TRAJECTORY_RATE * program.call("gradients", values)[1]
        _, examples = reference.example_gradients(exact, batch)
        exact = exact - _TRAJECTORY_RATE * clipped_sum(
            examples, batch.example_weights, l2_clip_norm=bound
        )
    return Measured(trajectory=relative_error(ours, exact))


def check_parity(
    program: LoadedProgram,
    reference: Reference,
    *,
    texts: GateTexts,
    shapes: Sequence[tuple[int, int]],
    embed_length: int,
    catalogues: Sequence[Tensor],
    vocabulary: int,
) -> Measured:
    """Measures at every shape and refuses what is above the gate.

    Guarantees: on return, no error is above its gate at any of ``shapes``, with any of
    ``catalogues``, after ``TRAJECTORY_STEPS`` steps, or for a full batch of random tokens of
    ``embed_length``; a NaN is refused; and the first call gives the same bits again after all
    others.

    Args:
        program: the finished ``.pte``.
        reference: the same model, layout and corpus in eager PyTorch.
        texts: what the rows are cut from.
        shapes: (batch, length) pairs.
        embed_length: tokens of the longest text to embed.
        catalogues: documents' embeddings of other numbers of documents than the reference has,
            for programs that take any; each is used with the last of the shapes but one.
        vocabulary: how many token ids there are.

    Raises:
        ParityError: names the quantity, the shape, the error and the gate.
    """
    worst = Measured()
    cases = [(shape, reference) for shape in shapes]
    cases += [(shapes[-2:][0], reference.over(documents)) for documents in catalogues]
    before = _first_gradient(program, reference, texts)
    for seed, ((size, length), eager) in enumerate(cases):
        batch = texts.batch(
            batch=size,
            length=length,
            # Among few documents, rows for different ones nearly cancel in the sum.
            num_documents=len(eager.corpus["documents"]) if eager is reference else 1,
            seed=seed,
        )
        theta = random_theta(eager.layout.num_values, seed=seed)
        found = measure(program, eager, theta, batch)
        if found.gradient > GRADIENT_GATE:
            found = dataclasses.replace(found, rounding=measure_rounding(eager, theta, batch))
        documents = (
            f", {len(eager.corpus['documents'])} documents" if eager is not reference else ""
        )
        _refuse_above_gate(found, f"at batch {size}, length {length}{documents}")
        worst = worst.worst(found)
    size, length = (
        min(wished, most) for wished, most in zip(_TRAJECTORY_SHAPE, shapes[-1], strict=True)
    )
    batches = [
        texts.batch(
            batch=size,
            length=length,
            num_documents=len(reference.corpus["documents"]),
            seed=step,
        )
        for step in range(TRAJECTORY_STEPS)
    ]
    found = measure_trajectory(program, reference, batches)
    _refuse_above_gate(found, f"after {TRAJECTORY_STEPS} steps")
    worst = worst.worst(found)
    size = max(size for size, _ in shapes)
    batch = random_batch(
        batch=size, length=embed_length, vocabulary=vocabulary, num_documents=2, seed=0
    )
    theta = random_theta(reference.layout.num_values, seed=0)
    found = measure_embed(program, reference, theta, batch)
    _refuse_above_gate(found, f"at batch {size}, length {embed_length}")
    if not torch.equal(_first_gradient(program, reference, texts), before):
        raise ParityError(
            "gradient: expected the same bits from the same call, got others after calls with "
            "other inputs. No bundle was written; this model cannot be exported as it is."
        )
    return worst.worst(found)


def _first_gradient(program: LoadedProgram, reference: Reference, texts: GateTexts) -> Tensor:
    batch = texts.batch(batch=1, length=MIN_LENGTH + 1, num_documents=2, seed=0)
    theta = random_theta(reference.layout.num_values, seed=0)
    return program.call("gradients", _inputs(reference, theta, batch))[1]


def _inputs(
    reference: Reference, theta: Tensor, batch: Batch, clip: float = PLAIN_GRADIENT_CLIP
) -> dict[str, Tensor]:
    return {
        "theta": theta,
        **reference.corpus,
        **batch.packed(),
        "labels": batch.labels,
        "example_weights": batch.example_weights,
        "l2_clip_norm": torch.tensor([clip]),
    }


def _refuse_above_gate(found: Measured, where: str) -> None:
    for name, error, gate in (
        ("gradient", found.gradient, _gradient_gate(found.rounding)),
        ("scores", found.scores, SCORES_GATE),
        ("loss", found.loss, LOSS_GATE),
        ("embed", found.embed, EMBED_GATE),
        ("theta", found.trajectory, TRAJECTORY_GATE),
    ):
        if not error <= gate:
            raise ParityError(
                f"{name} {where}: expected an error of at most "
                f"{gate:.1e} of the largest eager value, got {error:.1e}. "
                "No bundle was written; this model cannot be exported as it is."
            )


def _gradient_gate(rounding: float) -> float:
    return max(GRADIENT_GATE, min(ROUNDING_FACTOR * rounding, ROUNDING_CEILING))


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
