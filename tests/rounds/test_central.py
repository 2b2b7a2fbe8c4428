"""Mode central: noise of the stated size, and nothing exact about a cohort is told."""

from __future__ import annotations

import logging
import math
import re
import stat
from pathlib import Path

import fake_farm
import numpy as np
import pytest
from carpool_server.privacy.accounting import Epsilon
from fake_farm import FakeAggregator, answer, contribution_to, dealt
from flwr.app import Error, Message
from round_kit import RunHere, Witness, settings

from carpool.config import SgdConfig
from carpool.errors import CheckpointError, PrivacyError, RoundFailed
from carpool.protocol import RoundTask
from carpool_server import promise
from carpool_server.checkpoint import CHECKPOINT_NAME
from carpool_server.hooks import RoundFacts
from carpool_server.privacy.ledger import LEDGER_NAME, ledger

Z = 1.3


@pytest.fixture(autouse=True)
def cheap_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accountant has tests of its own; here a round costs 0.1."""
    monkeypatch.setattr(promise, "calibrate", lambda **_: Z)
    monkeypatch.setattr(
        ledger,
        "epsilon_of",
        lambda releases, delta: Epsilon(value=0.1 * len(releases), delta=delta, method="prv"),
    )


def nodes(count: int = 30) -> dict[int, FakeAggregator]:
    return {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(count, parts=2))}


class Thetas:
    """A hook that keeps the released thetas and records."""

    def __init__(self) -> None:
        self.thetas = [np.zeros(fake_farm.NUM_VALUES, dtype=np.float32)]
        self.facts: list[RoundFacts] = []

    def after_round(self, facts: RoundFacts) -> None:
        """Keeps them."""
        self.thetas.append(facts.theta)
        self.facts.append(facts)


def test_noise_of_the_stated_size_is_added_to_the_sum_before_the_division(
    run_here: RunHere,
) -> None:
    """Theta's steps minus the sums' share are Gaussian of z * C / cohort, round after round."""
    rounds, clip, cohort = 60, 0.5, 12.0
    config = settings(
        mode="central",
        rounds=rounds,
        privacy={"epsilon": 50.0},
    ).model_copy(update={"server": SgdConfig(learning_rate=1.0)})
    witness, kept = Witness(), Thetas()
    run_here(nodes(), config=config, audit=witness, hooks=[kept])
    noise = np.concatenate(
        [
            (after.astype(np.float64) - before) * cohort / clip - witness.sums[n] * 2.0**-30
            for n, (before, after) in enumerate(
                zip(kept.thetas[:-1], kept.thetas[1:], strict=True), start=1
            )
        ]
    )
    assert noise.size == rounds * fake_farm.NUM_VALUES
    # 6.1 standard errors of a sample variance and mean: false alarms below 1e-9
    assert abs(np.square(noise / Z).mean() - 1) < 6.1 * math.sqrt(2 / noise.size)
    assert abs((noise / Z).mean()) < 6.1 / math.sqrt(noise.size)


def test_fewer_replies_change_neither_noise_nor_scale(run_here: RunHere) -> None:
    """With nobody answering but the quorum at 0, a round is noise alone, of the same size."""
    config = settings(
        mode="central",
        rounds=40,
        privacy={"epsilon": 50.0},
        cohort={"quorum": 0.0, "deadline_seconds": 0.05, "extensions": 0},
    ).model_copy(update={"server": SgdConfig(learning_rate=1.0)})
    silent = {10: FakeAggregator(fake_farm.devices(30), lie=lambda _m, _t: None)}
    kept = Thetas()
    run_here(silent, config=config, hooks=[kept])
    steps = np.diff(np.array(kept.thetas, dtype=np.float64), axis=0) * 12.0 / 0.5 / Z
    assert abs(np.square(steps).mean() - 1) < 6.1 * math.sqrt(2 / steps.size)


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_that_was_put_back_releases_nothing_twice(
    run_here: RunHere,
    tmp_path: Path,
    kept: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """Other noise on the same sum would be a second release under one charge."""
    checkpoint = tmp_path / "run" / CHECKPOINT_NAME

    class Saves:
        def after_round(self, facts: RoundFacts) -> None:
            if facts.round_number == 2:
                (tmp_path / "old").write_bytes(checkpoint.read_bytes())

    nodes = {10: FakeAggregator(fake_farm.devices(30))}
    config = settings(mode="central")
    run_here(nodes, config=config, hooks=[Saves()])
    checkpoint.write_bytes((tmp_path / "old").read_bytes())
    last = tmp_path / "run" / "theta-round-0003.safetensors"
    before = last.read_bytes()
    if kept:
        expected: type[Exception] = CheckpointError
        message = (
            f"{last.parent}: expected no release after round 2, the checkpoint's, found "
            f"{last.name}."
        )
    else:
        last.unlink()
        expected = PrivacyError
        message = (
            f"{last.parent / LEDGER_NAME}: expected no release after round 2, the "
            "checkpoint's, got one of round 3."
        )
    with pytest.raises(expected, match=f"^{re.escape(message)}"):
        run_here(nodes, config=config, resume=True)
    assert not last.exists() or last.read_bytes() == before


def test_nothing_exact_about_a_cohort_is_told(
    run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in hooks, history or log; the key is in the checkpoint alone, for its owner's eyes."""
    caplog.set_level(logging.DEBUG)

    def lie(message: Message, task: RoundTask) -> Message:
        first_drawn = task.header.device_ids[0]  # the only one, in some of the random draws
        honest = contribution_to(task, refused={first_drawn: "diverged"})
        ids = (first_drawn, *honest.header.device_ids)
        header = honest.header.model_copy(update={"device_ids": ids, "count": len(ids)})
        return answer(message, type(honest)(header=header, total=honest.total))

    first, second = dealt(30, parts=2)
    kept = Thetas()
    result = run_here(
        {10: FakeAggregator(first), 11: FakeAggregator(second, lie=lie)},
        config=settings(mode="central", cohort={"quorum": 0.0}),
        hooks=[kept],
    )
    key = result.info.sampling_key
    assert key is not None
    told = repr([(f.record, f.refused) for f in kept.facts]) + repr(result.info.history)
    told += caplog.text
    assert "aggregator 11: refused" in caplog.text
    assert not [name for name in (*first, *second, key) if name in told]
    for record in result.info.history:
        private = (record.drawn, record.count, record.refused, record.rejected, record.mean_loss)
        assert (*private, record.bytes_down, record.bytes_up) == (None,) * 7
    assert [record.epsilon for record in result.info.history] == pytest.approx([0.1, 0.2, 0.3])
    path = tmp_path / "run" / CHECKPOINT_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    others = [p for p in (tmp_path / "run").iterdir() if p != path]
    assert not [p for p in others if key.encode() in p.read_bytes()]


def test_a_failed_round_tells_no_counts(run_here: RunHere) -> None:
    """What went wrong, without how many were drawn."""
    failing = FakeAggregator(
        fake_farm.devices(30),
        lie=lambda message, _task: Message(Error(code=1, reason="x"), reply_to=message),
    )
    config = settings(mode="central", cohort={"extensions": 0})
    with pytest.raises(RoundFailed) as caught:
        run_here({10: failing}, config=config)
    assert str(caught.value) == (
        "round 1: expected updates of at least 80% of the drawn devices after 0 extensions of 5 s, "
        "got fewer. Nothing was released; resume it with --resume."
    )


def test_every_run_draws_its_own_cohorts(run_here: RunHere) -> None:
    """The public seed says nothing about who is drawn."""
    first, second = Witness(), Witness()
    run_here(nodes(), config=settings(mode="central"), audit=first, out="first")
    run_here(nodes(), config=settings(mode="central"), audit=second, out="second")
    assert first.devices != second.devices


def test_a_spent_budget_ends_the_run_before_any_device_is_asked(
    run_here: RunHere, tmp_path: Path
) -> None:
    """The rounds before stay, with what they cost; starting again is refused."""
    config = settings(mode="central", privacy={"epsilon": 0.25})
    asked = nodes()
    result = run_here(asked, config=config)
    assert (result.info.round_number, result.info.ended) == (2, "budget")
    assert result.epsilon == pytest.approx(0.2)
    assert {task.round_number for node in asked.values() for task in node.tasks} == {1, 2}
    assert len(list(tmp_path.glob("run/theta-*"))) == 2

    for _ in range(2):
        again = nodes()
        with pytest.raises(PrivacyError) as caught:
            run_here(again, config=config, resume=True)
        assert not any(node.tasks for node in again.values())
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: the run ended at its budget after round 2 of 3, epsilon 0.200. What "
        "it released stays; no other round may be run."
    )


def test_runs_over_one_population_share_its_budget(run_here: RunHere, tmp_path: Path) -> None:
    """The second run composes with the first, and a third is refused before it asks anybody."""
    config = settings(mode="central", privacy={"epsilon": 0.45})
    book = tmp_path / "population.jsonl"
    first = run_here(nodes(), config=config, ledger_path=book, out="first")
    assert first.info.ended is None
    second = run_here(nodes(), config=config, ledger_path=book, out="second")
    assert (second.info.round_number, second.info.ended) == (1, "budget")
    assert second.epsilon == pytest.approx(0.4)
    asked = nodes()
    with pytest.raises(PrivacyError) as caught:
        run_here(asked, config=config, ledger_path=book, out="third")
    assert str(caught.value) == (
        f"{book}: round 1 would bring epsilon to 0.500 at delta 1e-05; 0.400 of the budget of "
        "0.45 is spent. Nothing more is released to this population."
    )
    assert not any(node.tasks for node in asked.values())
    assert not list(tmp_path.glob("third/theta-*"))


def test_another_promise_to_the_same_population_is_refused(
    run_here: RunHere, tmp_path: Path
) -> None:
    """A larger budget cannot be had by asking again."""
    book = tmp_path / "population.jsonl"
    run_here(nodes(), config=settings(mode="central"), ledger_path=book, out="first")
    config = settings(mode="central", privacy={"epsilon": 5.0})
    with pytest.raises(PrivacyError) as caught:
        run_here(nodes(), config=config, ledger_path=book, out="second")
    assert str(caught.value) == (
        f"{book}: expected the ledger's own epsilon 4.0, got 5.0. A population has one promise "
        "over all its runs: keep to it, or name another population's ledger."
    )


def test_a_lost_ledger_stops_the_resume(run_here: RunHere, tmp_path: Path) -> None:
    """An empty ledger beside released rounds is not believed; nor is one that lost its end."""

    class Stops:
        def after_round(self, facts: RoundFacts) -> None:
            if facts.round_number == 2:
                raise InterruptedError

    config = settings(mode="central")
    with pytest.raises(InterruptedError):
        run_here(nodes(), config=config, hooks=[Stops()])
    book = tmp_path / "run" / LEDGER_NAME
    lines = book.read_bytes().splitlines(keepends=True)
    for kept in ([], lines[:2]):
        book.write_bytes(b"".join(kept))
        with pytest.raises(PrivacyError) as caught:
            run_here(nodes(), config=config, resume=True)
        assert str(caught.value).startswith(
            f"{book}: expected the ledger that the run's checkpoint was written beside, with a line"
        )
