"""From finished runs to a report: every number in it is computed here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import Dataset, SplitName
from carpool.data.folder import SUMMARY_NAME, Summary
from carpool.machine import processor
from carpool.progress import progress
from carpool.randomness import shuffled, words
from carpool_device.evaluation import (
    METRICS,
    Queries,
    Ranking,
    evaluate_bm25,
    paired_difference,
    prepare_queries,
    rank_queries,
)
from carpool_device.evaluation.report import BM25, ZERO_SHOT, summarise_all
from carpool_device.runtime import DeviceProgram
from carpool_server.checkpoint import CHECKPOINT_NAME, RunInfo, read_checkpoint, release_name
from carpool_server.statement import privacy_statement
from carpool_sim.report.model import Comparison, CurvePoint, Report, Training

CURVE_EVERY = 5
"""Rounds between two points of the curve."""

CURVE_QUERIES = 400
"""The curve's sample is made of whole clients until it has at least this many queries."""


def measure(
    bundle: Bundle,
    data: Path,
    runs: Mapping[str, Path],
    *,
    compare: Sequence[tuple[str, str]],
    split: SplitName = "validation",
) -> Report:
    """Evaluates finished runs against BM25 and zero-shot on clients never trained on.

    Args:
        bundle: what the runs trained.
        data: the data set's folder.
        runs: each system's run folder, in the order of the table.
        compare: pairs (system, against) to test; names of runs, ``BM25`` or ``ZERO_SHOT``.
        split: whose clients ask.

    Raises:
        CheckpointError: a run that cannot be read.
        CorpusError: the data set cannot be read.
        ThetaError: a run of another bundle.
    """
    program = DeviceProgram.load(bundle)
    examples = Dataset.open(data).part(split)
    queries = prepare_queries(program.tokenizer, program.document_index, examples)
    infos = {name: read_checkpoint(folder / CHECKPOINT_NAME).info for name, folder in runs.items()}
    thetas = {
        name: _released(bundle, folder, infos[name].round_number) for name, folder in runs.items()
    }
    rankings: dict[str, Ranking] = {}
    with progress(BM25, total=len(queries.rows)) as bar:
        rankings[BM25] = evaluate_bm25(program.documents, examples, on_progress=bar.advance)
    for name, theta in {ZERO_SHOT: bundle.initial_theta(), **thetas}.items():
        with progress(name, total=len(queries.rows)) as bar:
            rankings[name] = rank_queries(program, theta, queries, on_progress=bar.advance)
    sample = sample_clients(examples, at_least=CURVE_QUERIES)
    curve_queries = prepare_queries(program.tokenizer, program.document_index, sample)
    untrained = _point(program, bundle.initial_theta(), curve_queries, round_number=0)
    trainings = {
        name: _training(
            bundle, program, runs[name], infos[name], curve_queries, untrained=untrained, name=name
        )
        for name in runs
    }
    return Report(
        preset=bundle.manifest.preset,
        bundle_id=bundle.id,
        data=Summary.model_validate_json((data / SUMMARY_NAME).read_bytes()),
        split=split,
        clients=len(queries.clients),
        queries=len(queries.rows),
        curve_clients=len(curve_queries.clients),
        curve_queries=len(curve_queries.rows),
        curve_baseline=float(
            METRICS["acc@1"](evaluate_bm25(program.documents, sample).ranks).mean()
        ),
        systems=summarise_all(rankings),
        comparisons=tuple(
            Comparison(
                system=system,
                against=against,
                metric=metric,
                difference=paired_difference(rankings[system], rankings[against], metric),
            )
            for system, against in compare
            for metric in METRICS
        ),
        trainings=trainings,
        processor=processor(),
        cores=os.cpu_count() or 1,
    )


def sample_clients(
    examples: Mapping[str, Sequence[Example]], *, at_least: int
) -> dict[str, Sequence[Example]]:
    """A fixed random sample of whole clients with ``at_least`` examples, or all of them.

    Equal client names give equal samples, on every machine and in every run.
    """
    names = sorted(examples)
    stream = words(purpose="carpool/1/split", key=b"curve", device_id="", round_number=0)
    sample: dict[str, Sequence[Example]] = {}
    for place in shuffled(len(names), stream):
        if sum(map(len, sample.values())) >= at_least:
            break
        sample[names[place]] = examples[names[place]]
    return sample


def _training(
    bundle: Bundle,
    program: DeviceProgram,
    folder: Path,
    info: RunInfo,
    queries: Queries,
    *,
    untrained: CurvePoint,
    name: str,
) -> Training:
    rounds = [r for r in range(1, info.round_number + 1) if (folder / release_name(r)).exists()]
    curve = [untrained]  # every run starts there
    with progress(f"curve: {name}", total=len(rounds)) as bar:
        for round_number in rounds:
            theta = _released(bundle, folder, round_number)
            curve.append(_point(program, theta, queries, round_number=round_number))
            bar.advance()
    layout = bundle.manifest.layout
    return Training(
        config=info.config,
        trained_values=int(np.count_nonzero(layout.group_mask(info.config.local.train))),
        population=info.population.size,
        noise_multiplier=info.noise_multiplier,
        epsilon=info.history[-1].epsilon if info.history else None,
        statement=tuple(privacy_statement(info)),
        seconds=sum(record.seconds for record in info.history),
        bytes_down=_total(record.bytes_down for record in info.history),
        bytes_up=_total(record.bytes_up for record in info.history),
        versions=info.versions,
        theta=f"{folder.name}/{release_name(info.round_number)}",
        curve=tuple(curve),
    )


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _point(
    program: DeviceProgram, theta: NDArray[np.float32], queries: Queries, *, round_number: int
) -> CurvePoint:
    ranks = rank_queries(program, theta, queries).ranks
    return CurvePoint(
        round_number=round_number,
        accuracy=float(METRICS["acc@1"](ranks).mean()),
        reciprocal_rank=float(METRICS["MRR@10"](ranks).mean()),
    )


def _released(bundle: Bundle, folder: Path, round_number: int) -> NDArray[np.float32]:
    return bundle.read_theta(folder / release_name(round_number))
