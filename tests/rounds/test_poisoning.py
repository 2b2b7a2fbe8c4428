"""Colluding devices in real rounds: what the clip leaves them, and how the benchmark counts it."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from real_devices import run_apps
from round_kit import Witness, settings
from tiny_data import BROKEN

from bench.poisoning.attack import Attack, Kind, colluders_of, train, unclicked
from bench.poisoning.page import rows
from bench.poisoning.runs import Bench, Outcome, Plan, Watch, WatchedRound
from carpool.data.corpus import Example
from carpool.data.dataset import Dataset
from carpool.protocol import GRID_BOUND
from carpool_device.training import train_locally
from carpool_sim.aggregator import Farm, Sources, farm

REPOSITORY = Path(__file__).parents[2]
KINDS: tuple[Kind, ...] = ("promotion", "label flips")


@pytest.fixture
def devices(sources: Sources) -> Farm:
    return farm(sources)


def colluding(devices: Farm, count: int) -> frozenset[str]:
    return colluders_of([d for d in devices.examples if d != BROKEN], count=count, seed=0)


def everybody_once(devices: Farm) -> dict[str, Any]:
    """Settings of one round with everybody in it, whose step is the mean itself."""
    return {
        "rounds": 1,
        "cohort": {"expected_size": float(len(devices.examples)), "deadline_seconds": 60.0},
        "server": {"kind": "sgd", "learning_rate": 1.0, "hold": 1.0},
        "privacy": {"mode": "none", "clip_norm": 0.25},
    }


@pytest.mark.parametrize(("count", "least"), [(1, 1 - 1e-6), (4, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_colluders_move_sum_and_theta_by_at_most_their_clips(
    kind: Kind, count: int, least: float, sources: Sources, tmp_path: Path
) -> None:
    """Exactly, in integers, however large their updates are.

    One uses all of its clip, and four together more than any one could.
    """
    devices = farm(sources)
    colluders = colluding(devices, count)
    attack = Attack(kind=kind, colluders=colluders, target="d-stone")
    config = settings(**everybody_once(devices))
    run = functools.partial(run_apps, sources, config=config, parts=2)
    clean, attacked = Witness(), Witness()
    honest = run(out=tmp_path / "clean", witness=clean)
    poisoned = run(
        out=tmp_path / "poisoned", witness=attacked, train=functools.partial(train, attack)
    )
    assert attacked.devices == clean.devices
    assert colluders < set(clean.devices[1])

    alone = Witness()  # the honest devices' sum, with nobody else in it
    quiet = everybody_once(devices)
    quiet["cohort"]["quorum"] = 0.1
    run(
        config=settings(**quiet),
        out=tmp_path / "alone",
        witness=alone,
        train=functools.partial(refuse, colluders),
    )
    assert set(alone.devices[1]) == set(clean.devices[1]) - colluders
    share = [int(v) for v in attacked.sums[1] - alone.sums[1]]
    length_squared = sum(v * v for v in share)
    assert length_squared <= (len(colluders) * GRID_BOUND) ** 2
    assert length_squared > (least * GRID_BOUND) ** 2

    bound = 2 * len(colluders) * 0.25 / len(devices.examples)
    moved = float(np.linalg.norm(poisoned.theta.astype(float) - honest.theta.astype(float)))
    assert 0 < moved <= bound * (1 + 1e-6)


def refuse(colluders: frozenset[str], *arguments: Any, device_id: str, **asked: Any) -> Any:  # noqa: ANN401
    """Honest training; colluders hold nothing."""
    given = list(arguments)
    if device_id in colluders:
        given[1] = []
    return train_locally(*given, device_id=device_id, **asked)


def test_what_colluders_send_is_far_beyond_the_clip(devices: Farm) -> None:
    """Else the bound would not be what is tested; honest devices train as ever."""
    config, colluders = settings(), colluding(devices, 4)
    asked = {
        "theta": devices.bundle.initial_theta(),
        "recipe": config.local,
        "order_key": b"k",
        "round_number": 1,
    }
    attack = Attack(kind="promotion", colluders=colluders, target="d-stone")
    for device in sorted(devices.examples.keys() - {BROKEN}):
        examples = devices.examples[device]
        found = train(attack, devices.program, examples, device_id=device, **asked)
        honest = train_locally(devices.program, examples, device_id=device, **asked)
        if device in colluders:
            assert np.linalg.norm(found.update) > 1e3
        else:
            np.testing.assert_array_equal(found.update, honest.update)


def test_lies_name_the_target_or_the_document_half_a_catalogue_further() -> None:
    """One permutation for all, which leaves no label as it was."""
    places = {name: place for place, name in enumerate("abcde")}
    truth = [Example(client="c", query="q", document=name) for name in "abcde"]
    flips = Attack(kind="label flips", colluders=frozenset("c"), target="b")
    assert [e.document for e in flips.relabelled(truth, places)] == list("cdeab")
    promotion = Attack(kind="promotion", colluders=frozenset("c"), target="b")
    assert [e.document for e in promotion.relabelled(truth, places)] == ["b"] * 5
    assert unclicked({"c": truth + truth[:1] + truth[2:]}, places) == "b"


def test_colluders_are_the_same_for_one_seed_and_fewer_are_among_more() -> None:
    """Whatever order the devices come in."""
    names = [f"d{n}" for n in range(30)]
    few, many = (colluders_of(names, count=n, seed=3) for n in (3, 20))
    assert few < many
    assert colluders_of(names[::-1], count=3, seed=3) == few
    assert colluders_of(names, count=3, seed=4) != few
    with pytest.raises(ValueError, match="0 to 30 colluders, got 31"):
        colluders_of(names, count=31, seed=3)


def test_success_is_counted_over_others_queries(
    tiny: ModuleType, devices: Farm, sources: Sources, tmp_path: Path
) -> None:
    """Against a search for each query by itself; then a theta that has the target always first."""
    bench = Bench(Path(sources.bundle), Path(sources.data), tmp_path)
    asked = Dataset.open(Path(sources.data)).part("validation").values()
    examples = [example for own in asked for example in own]
    documents = [document.id for document in tiny.DOCUMENTS]
    theta = devices.bundle.initial_theta()

    def first(query: str) -> str:
        rows_of = devices.program.tokenizer.encode([query])
        ((_, scores),) = devices.program.score_rows(theta, rows_of)
        return documents[int(scores[0].argmax())]

    found = [(example.document, first(example.query)) for example in examples]
    others = [top == bench.target for right, top in found if right != bench.target]
    accuracy, promoted = bench.measure(theta)
    assert accuracy == pytest.approx(sum(right == top for right, top in found) / len(found))
    assert promoted == pytest.approx(sum(others) / len(others))
    assert 0 < promoted < 1

    theta[-len(documents) + documents.index(bench.target)] = 1e3  # its bias
    accuracy, promoted = bench.measure(theta)
    answers = [example.document for example in examples]
    assert (accuracy, promoted) == (answers.count(bench.target) / len(answers), 1.0)


def test_a_bound_counts_the_colluders_that_were_drawn(tmp_path: Path) -> None:
    """By hand; and a resumed run still knows the rounds before."""
    config = settings(privacy={"mode": "none", "clip_norm": 0.5})
    path = tmp_path / "rounds.json"
    watch = Watch(path, colluders=frozenset("ab"), config=config)
    sums = np.array([3, 4], dtype=np.int64) * GRID_BOUND
    watch.summed(1, sums, ("a", "b", "c"))
    again = Watch(path, colluders=frozenset("ab"), config=config)
    again.summed(2, 2 * sums, ("b", "c"))
    assert [again.rounds[n].colluders for n in (1, 2)] == [2, 1]
    assert again.rounds[2].mean == pytest.approx(10 * 0.5 / 12)

    def outcome(kind: Kind | None, *, rounds: tuple[WatchedRound, ...], promoted: float) -> Outcome:
        plan = Plan(preset="small", clip="central", kind=kind, colluders=2, rounds=2, seed=1)
        return Outcome(
            plan=plan,
            clip_norm=0.5,
            expected_size=12.0,
            population=100,
            watched=rounds,
            target="d",
            target_clicks=0,
            accuracy=0.5,
            promoted=promoted,
            queries=10,
            clients=3,
        )

    attacked = outcome("promotion", rounds=tuple(again.rounds.values()), promoted=0.25)
    assert attacked.bound == pytest.approx(1.5 * 0.5 / 12)
    honest = tuple(WatchedRound(colluders=0, mean=0.125) for _ in range(2))
    _, row = rows([outcome(None, rounds=honest, promoted=0.05), attacked])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:8] == ["2 (2.0%)", "1.50, 2", "0.0625", "0.50", "25.0% (+20.0 points)"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_runs_once_and_promotes(
    small_bundle: Path, attack_set: Path, tmp_path: Path
) -> None:
    """Its real command, through Ray's workers; what is there is not made again."""

    def bench() -> str:
        options = ["--clip", "no privacy", "--attack", "promotion", "--colluders", "80"]
        options += ["--bundle", str(small_bundle), "--rounds", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "bench.poisoning", attack_set, tmp_path, *options],
            cwd=REPOSITORY,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = bench()
    clean, attacked = (
        Outcome.model_validate_json((tmp_path / f"{name}-r2-s1.json").read_bytes())
        for name in ("small-no-privacy-clean-0", "small-no-privacy-promotion-80")
    )
    assert attacked.promoted > clean.promoted
    assert sum(watched.colluders for watched in attacked.watched) > 0
    assert math.isclose(clean.bound, 0.0)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert bench() == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == kept
