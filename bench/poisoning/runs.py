"""One run with colluders among its devices: made, watched, and measured on unseen clients."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.poisoning.attack import Attack, Kind, colluders_of, train, unclicked
from carpool.bundle import Bundle
from carpool.config import RunConfig
from carpool.data.dataset import Dataset
from carpool.files import write_atomically
from carpool.schema import Model
from carpool_device.evaluation import METRICS, Queries, prepare_queries
from carpool_device.evaluation.metrics import ranks_of
from carpool_device.runtime import DeviceProgram
from carpool_device.training import train_locally
from carpool_server.hooks import Step
from carpool_server.privacy.clipping import grid_step
from carpool_sim.settings import packaged_settings
from carpool_sim.shown import run_shown

ClipName = Literal["central", "no privacy"]


class Plan(Model):
    """One run.

    Attributes:
        preset: of the bundle.
        clip: whose shipped clip; all else is as in the shipped settings of no privacy.
        kind: the attack; None for none.
        colluders: how many devices.
        rounds, seed: of the run.
    """

    preset: str
    clip: ClipName
    kind: Kind | None = None
    colluders: int = 0
    rounds: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and files."""
        kind = (self.kind or "clean").replace(" ", "-")
        clip = self.clip.replace(" ", "-")
        return f"{self.preset}-{clip}-{kind}-{self.colluders}-r{self.rounds}-s{self.seed}"

    @property
    def config(self) -> RunConfig:
        """The settings, in mode ``none``: noise could only help the defence."""
        source = f"{self.preset}-central" if self.clip == "central" else self.preset
        clip_norm = packaged_settings(source).privacy.clip_norm
        return packaged_settings(
            self.preset,
            overrides=(
                f"rounds={self.rounds}",
                f"seed={self.seed}",
                f"privacy.clip_norm={clip_norm}",
            ),
        )


class WatchedRound(Model):
    """What the audit saw of a round.

    Attributes:
        colluders: of them in the sum.
        mean: L2 norm of the mean that the server optimiser got, in theta's units.
    """

    colluders: int
    mean: float


class Outcome(Model):
    """What a finished run came to, on clients that were never trained on.

    Attributes:
        plan: the run.
        clip_norm, expected_size: C and the fixed denominator.
        population: devices in all.
        watched: its rounds, in order.
        target, target_clicks: the promoted document's id, and how many honest examples name it.
        accuracy: acc@1 over all queries.
        promoted: share of the queries with another right document that get ``target`` first.
        queries, clients: asked.
    """

    plan: Plan
    clip_norm: float
    expected_size: float
    population: int
    watched: tuple[WatchedRound, ...]
    target: str
    target_clicks: int
    accuracy: float
    promoted: float
    queries: int
    clients: int

    @property
    def bound(self) -> float:
        """Most that the colluders can have added to a round's mean, averaged over the rounds.

        Each is in a round's integer sum at most once and at most C long, whatever it sent.
        """
        drawn = sum(watched.colluders for watched in self.watched) / len(self.watched)
        return drawn * self.clip_norm / self.expected_size

    @property
    def mean_length(self) -> float:
        """Of a round's whole mean, averaged over the rounds."""
        return sum(watched.mean for watched in self.watched) / len(self.watched)


class Watch:
    """An audit that counts colluders and keeps the mean's length; a resumed run goes on with it.

    Args:
        path: where it keeps them.
        colluders: device ids.
        config: of the run.
    """

    def __init__(self, path: Path, *, colluders: frozenset[str], config: RunConfig) -> None:
        self._path = path
        self._colluders = colluders
        self._unit = grid_step(config.privacy.clip_norm) / config.cohort.expected_size
        found = json.loads(path.read_text()) if path.exists() else {}
        self.rounds = {int(n): WatchedRound.model_validate(seen) for n, seen in found.items()}

    def summed(
        self, round_number: int, total: NDArray[np.int64], device_ids: tuple[str, ...]
    ) -> None:
        """Keeps the round; one that is done again replaces itself."""
        self.rounds[round_number] = WatchedRound(
            colluders=len(self._colluders.intersection(device_ids)),
            mean=float(np.linalg.norm(total.astype(np.float64))) * self._unit,
        )
        text = json.dumps({n: seen.model_dump() for n, seen in sorted(self.rounds.items())})
        write_atomically(self._path, text.encode())

    def reached(self, round_number: int, step: Step) -> None:
        """Does nothing."""


class Bench:
    """A bundle, a data set, and a folder in which runs are made once.

    Args:
        bundle: the bundle's folder.
        data: the data set's folder.
        out: where runs and their outcomes are kept.

    Raises:
        BundleError, CorpusError: what cannot be used.
    """

    def __init__(self, bundle: Path, data: Path, out: Path) -> None:
        self._path, self._data, self._out = bundle, data, out
        self._bundle = Bundle.open(bundle)
        dataset = Dataset.open(data)
        self._devices = dataset.part("train")
        self._program = DeviceProgram.load(self._bundle)
        self.target = unclicked(self._devices, self._program.document_index)
        examples = [example for own in self._devices.values() for example in own]
        self._clicks = sum(example.document == self.target for example in examples)
        self._queries = prepare_queries(
            self._program.tokenizer, self._program.document_index, dataset.part("validation")
        )

    @property
    def preset(self) -> str:
        """The bundle's."""
        return self._bundle.manifest.preset

    def outcome(self, plan: Plan) -> Outcome:
        """Makes the run, or what is left of it, and measures it, once."""
        kept = self._out / f"{plan.name}.json"
        if kept.exists():
            return Outcome.model_validate_json(kept.read_bytes())
        config, folder = plan.config, self._out / plan.name
        colluders = colluders_of(list(self._devices), count=plan.colluders, seed=plan.seed)
        watch = Watch(folder.with_suffix(".rounds.json"), colluders=colluders, config=config)
        attacked = train_locally
        if plan.kind is not None:
            attack = Attack(kind=plan.kind, colluders=colluders, target=self.target)
            attacked = functools.partial(train, attack)
        result = run_shown(
            self._path,
            self._data,
            folder,
            config,
            name=plan.name,
            audit=watch,
            train=attacked,
        )
        accuracy, promoted = self.measure(result.theta)
        outcome = Outcome(
            plan=plan,
            clip_norm=config.privacy.clip_norm,
            expected_size=config.cohort.expected_size,
            population=len(self._devices),
            watched=tuple(watch.rounds[n] for n in range(1, config.rounds + 1)),
            target=self.target,
            target_clicks=self._clicks,
            accuracy=accuracy,
            promoted=promoted,
            queries=len(self._queries.rows),
            clients=len(self._queries.clients),
        )
        write_atomically(kept, outcome.model_dump_json(indent=1).encode())
        return outcome

    def measure(self, theta: NDArray[np.float32]) -> tuple[float, float]:
        """acc@1, and the share of others' queries that find the target at the top."""
        queries = self._queries
        target = np.full_like(queries.right, self._program.document_index[self.target])
        right, top = _ranks(self._program, theta, queries, queries.right, target)
        others = queries.right != target
        hits = METRICS["acc@1"]
        return float(hits(right).mean()), float(hits(top[others]).mean())


def _ranks(
    program: DeviceProgram,
    theta: NDArray[np.float32],
    queries: Queries,
    *documents: NDArray[np.int64],
) -> list[NDArray[np.int64]]:
    """The rank of each query's document, for several choices of documents, in one pass."""
    ranks = [np.zeros_like(chosen) for chosen in documents]
    for places, scores in program.score_rows(theta, queries.rows):
        for found, chosen in zip(ranks, documents, strict=True):
            found[places] = ranks_of(scores, chosen[places])
    return ranks
