"""The gate: what differs from eager PyTorch by more than rounding is not written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carpool.bundle.manifest import Parity, ParityCase
from carpool.errors import ParityError
from carpool_export.gate_texts import GateTexts
from carpool_export.methods import MIN_LENGTH
from carpool_export.parity import (
    Measured,
    measure,
    measure_embed,
    measure_rounding,
    measure_trajectory,
    random_batch,
    random_theta,
    step_inputs,
)
from carpool_export.reference import Batch, Reference
from carpool_export.runner import LoadedProgram

GRADIENT_GATE = 2e-6
"""Largest gradient error let through, as a share of the largest eager gradient: 17 float32
roundings (2**-23) of that value."""

ROUNDING_FACTOR = 8.0
ROUNDING_CEILING = 2e-5
"""Where a gradient's error is above its gate, it may be this many times the error that eager
PyTorch in float32 has in the same place, up to this share. A deep model at few tokens is that ill
conditioned: on SmolLM2-135M with a row of two tokens eager float32 itself is up to 7e-6 off, and
which of two that add in another order is nearer differs from text to text."""

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
_TRAJECTORY_SHAPE = (2, 16)


def gate_shapes(*, max_batch: int, max_length: int) -> list[tuple[int, int]]:
    """(batch, length) pairs over the whole range: corners, odd sizes, and the usual one."""
    wished = [(1, 2), (1, max_length), (3, 17), (5, 33), (max_batch, 32), (max_batch, max_length)]
    inside = [(min(batch, max_batch), min(length, max_length)) for batch, length in wished]
    return list(dict.fromkeys(inside))


def check_parity(
    program: LoadedProgram,
    reference: Reference,
    *,
    texts: GateTexts,
    shapes: Sequence[tuple[int, int]],
    embed_length: int,
    catalogues: Sequence[Tensor],
    vocabulary: int,
) -> Parity:
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

    Returns:
        What was measured, for the manifest.

    Raises:
        ParityError: names the quantity, the shape, the error and the gate.
    """
    before = _first_gradient(program, reference, texts)
    places = [(shape, reference) for shape in shapes]
    places += [(shapes[-2:][0], reference.over(documents)) for documents in catalogues]
    worst, cases = Measured(), []
    for seed, (shape, eager) in enumerate(places):
        catalogue = "" if eager is reference else f", {len(eager.corpus['documents'])} documents"
        batch = texts.batch(
            batch=shape[0],
            length=shape[1],
            # Among few documents, rows for different ones nearly cancel in the sum.
            num_documents=len(eager.corpus["documents"]) if eager is reference else 1,
            seed=seed,
        )
        found, case = _compare(program, eager, shape, batch, seed=seed, where=catalogue)
        worst = worst.worst(found)
        cases.append(case)
    found = measure_trajectory(program, reference, _trajectory(reference, texts, shapes[-1]))
    _refuse_above_gate(found, f"after {TRAJECTORY_STEPS} steps")
    worst = worst.worst(found)
    size = max(size for size, _ in shapes)
    batch = random_batch(
        batch=size, length=embed_length, vocabulary=vocabulary, num_documents=2, seed=0
    )
    theta = random_theta(reference.layout.num_values, seed=0)
    found = measure_embed(program, reference, theta, batch)
    _refuse_above_gate(found, f"at batch {size}, length {embed_length}")
    worst = worst.worst(found)
    if not torch.equal(_first_gradient(program, reference, texts), before):
        raise ParityError(
            "gradient: expected the same bits from the same call, got others after calls with "
            "other inputs. No bundle was written; this model cannot be exported as it is."
        )
    return Parity(
        gate=GRADIENT_GATE,
        gradient_error=worst.gradient,
        scores_error=worst.scores,
        loss_error=worst.loss,
        embed_error=worst.embed,
        trajectory_error=worst.trajectory,
        trajectory_steps=TRAJECTORY_STEPS,
        cases=tuple(cases),
    )


def _compare(
    program: LoadedProgram,
    eager: Reference,
    shape: tuple[int, int],
    batch: Batch,
    *,
    seed: int,
    where: str,
) -> tuple[Measured, ParityCase]:
    theta = random_theta(eager.layout.num_values, seed=seed)
    found = measure(program, eager, theta, batch)
    rounding = None
    if found.gradient > GRADIENT_GATE:
        rounding = measure_rounding(eager, theta, batch)
    _refuse_above_gate(found, f"at batch {shape[0]}, length {shape[1]}{where}", rounding=rounding)
    return found, ParityCase(
        batch=shape[0],
        length=shape[1],
        documents=len(eager.corpus["documents"]),
        gradient_error=found.gradient,
        eager_float32_error=rounding,
    )


def _trajectory(reference: Reference, texts: GateTexts, largest: tuple[int, int]) -> list[Batch]:
    size, length = map(min, _TRAJECTORY_SHAPE, largest)
    return [
        texts.batch(
            batch=size,
            length=length,
            num_documents=len(reference.corpus["documents"]),
            seed=step,
        )
        for step in range(TRAJECTORY_STEPS)
    ]


def _first_gradient(program: LoadedProgram, reference: Reference, texts: GateTexts) -> Tensor:
    batch = texts.batch(batch=1, length=MIN_LENGTH + 1, num_documents=2, seed=0)
    theta = random_theta(reference.layout.num_values, seed=0)
    return program.call("gradients", step_inputs(reference, theta, batch))[1]


def _refuse_above_gate(found: Measured, where: str, *, rounding: float | None = None) -> None:
    allowed = min(ROUNDING_FACTOR * (rounding or 0.0), ROUNDING_CEILING)
    for name, error, gate in (
        ("gradient", found.gradient, max(GRADIENT_GATE, allowed)),
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
