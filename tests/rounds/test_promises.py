"""Whole rounds under a promise: who replies, caps, adaptive clip, metrics, projections."""

from __future__ import annotations

import hashlib
import math
import stat
import time
from collections import Counter
from pathlib import Path

import fake_farm
import numpy as np
import pytest
from fake_farm import FakeAggregator, answer, contribution_to, dealt
from flwr.app import Message
from round_kit import RunHere, Witness, settings

from carpool.config import RunConfig, SgdConfig
from carpool.errors import PrivacyError, ThetaError
from carpool.protocol import RoundTask
from carpool_server.hooks import RoundFacts
from carpool_server.participation import PARTICIPATION_NAME, Participation
from carpool_server.privacy.accounting import Epsilon, rounded_up
from carpool_server.privacy.clipping import clip_to_grid
from carpool_server.privacy.ledger import LEDGER_NAME, ledger, read_ledger
from carpool_server.statement import privacy_statement

CLIP, COHORT = 0.5, 12.0


def nodes(count: int = 30) -> dict[int, FakeAggregator]:
    return {10 + n: FakeAggregator(ids) for n, ids in enumerate(dealt(count, parts=2))}


Z = 1.3


@pytest.fixture(autouse=True)
def cheap_sampled_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """PRV takes half a second a round and has tests of its own; here a round costs 0.1."""
    monkeypatch.setattr(
        ledger,
        "epsilon_of",
        lambda releases, delta: Epsilon(value=0.1 * len(releases), delta=delta, method="prv"),
    )


def central(*, rounds: int, **privacy: object) -> RunConfig:
    """The server's step is the mean itself, so that theta shows what was released."""
    privacy = {"epsilon": 50.0, "noise_multiplier": Z, **privacy}
    config = settings(mode="central", rounds=rounds, privacy=privacy)
    return config.model_copy(update={"server": SgdConfig(learning_rate=1.0)})


class Steps:
    """A hook that keeps each round's step of theta."""

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []
        self.facts: list[RoundFacts] = []
        self._before = np.zeros(fake_farm.NUM_VALUES)

    def after_round(self, facts: RoundFacts) -> None:
        """Keeps it."""
        self.steps.append(facts.theta.astype(np.float64) - self._before)
        self._before = facts.theta.astype(np.float64)
        self.facts.append(facts)


def replying(who: str) -> dict[int, FakeAggregator]:
    """Two aggregators that are silent, or leave out all but one, or half, of their devices."""

    def lie(message: Message, task: RoundTask) -> Message | None:
        ids = task.header.device_ids
        first = message.metadata.dst_node_id == 10
        count = {"one": 1 if first else 0, "half": len(ids) // 2, "all": len(ids)}
        if who == "none" or not ids:
            return None
        refused = dict.fromkeys(ids[count[who] :], "diverged")
        return answer(message, contribution_to(task, refused=refused))

    halves = dealt(30, parts=2)
    return {10 + n: FakeAggregator(ids, lie=lie) for n, ids in enumerate(halves)}


@pytest.mark.parametrize("who", ["none", "one", "half", "all"])
def test_sigma_on_the_sum_does_not_depend_on_who_replies(run_here: RunHere, who: str) -> None:
    """None, one, half or all of the cohort."""
    config = central(rounds=40).model_copy(
        update={
            "cohort": settings(
                cohort={"quorum": 0.0, "deadline_seconds": 0.05, "extensions": 0}
            ).cohort
        }
    )
    witness, kept = Witness(), Steps()
    run_here(replying(who), config=config, audit=witness, hooks=[kept])
    sigma = Z * CLIP
    sums = [witness.sums[n] * CLIP * 2.0**-30 for n in range(1, 41)]
    noise = np.array([s * COHORT - t for s, t in zip(kept.steps, sums, strict=True)]) / sigma
    # 6.1 standard errors of a sample variance: false alarms below 1e-9
    assert abs(np.square(noise).mean() - 1) < 6.1 * math.sqrt(2 / noise.size)
    counts = [len(devices) for devices in witness.devices.values()]
    most = {"none": 0, "one": 1}.get(who)
    assert max(counts) == most if most is not None else max(counts) > 1


def test_duplicated_and_late_replies_count_once_and_leave_sigma_alone(run_here: RunHere) -> None:
    """One aggregator answers after the deadline, so another is asked too, and both answer."""

    def late(message: Message, task: RoundTask) -> Message:
        time.sleep(0.25)
        return answer(message, contribution_to(task))

    everybody = fake_farm.devices(30)
    config = central(rounds=15)
    cohort = {"quorum": 0.5, "deadline_seconds": 0.15, "extensions": 2, "expected_size": COHORT}
    config = config.model_copy(update={"cohort": settings(cohort=cohort).cohort})
    witness, kept = Witness(), Steps()
    run_here(
        {10: FakeAggregator(everybody, lie=late), 11: FakeAggregator(everybody, lie=late)},
        config=config,
        audit=witness,
        hooks=[kept],
    )
    noise = []
    for number, step in enumerate(kept.steps, start=1):
        before = np.zeros(fake_farm.NUM_VALUES) if number == 1 else kept.facts[number - 2].theta
        once = sum(
            clip_to_grid(hashed_update(d, number, before), clip_norm=CLIP, device_id=d)
            for d in witness.devices[number]
        )
        np.testing.assert_array_equal(witness.sums[number], once)
        noise.append((step * COHORT - np.asarray(once) * CLIP * 2.0**-30) / (Z * CLIP))
    asked_twice = [facts.record.extensions for facts in kept.facts]
    assert min(asked_twice) >= 1
    values = np.concatenate(noise)
    assert abs(np.square(values).mean() - 1) < 6.1 * math.sqrt(2 / values.size)


def hashed_update(device: str, number: int, theta: np.ndarray) -> np.ndarray:
    """What a fake device sends in a round, worked out without its task."""
    raw = hashlib.shake_256(f"{device} {number}".encode()).digest(4 * fake_farm.NUM_VALUES)
    values = (np.frombuffer(raw, dtype="<u4") / 2**32 - 0.5).astype(np.float32)
    return values - np.float32(0.1) * theta.astype(np.float32)


def capped(*, rounds: int, cap: int = 2, **cohort: float) -> RunConfig:
    config = settings(
        mode="central",
        rounds=rounds,
        privacy={"regime": "participation-cap", "max_participations": cap, "epsilon": 4.0},
        cohort={"expected_size": 12.0, **cohort},
    )
    return config.model_copy(update={"server": SgdConfig(learning_rate=1.0)})


def test_no_device_passes_its_cap_and_the_run_ends_when_too_few_are_left(
    run_here: RunHere, tmp_path: Path
) -> None:
    """30 devices twice each are 60 places: about five rounds of 12, and never a third one."""
    witness = Witness()
    result = run_here(nodes(), config=capped(rounds=30), audit=witness)
    assert result.info.ended == "participation-cap"
    counts = Counter(device for drawn in witness.devices.values() for device in drawn)
    assert max(counts.values()) == 2
    assert sum(1 for n in counts.values() if n < 2) + 30 - len(counts) < 12
    book = tmp_path / "run" / PARTICIPATION_NAME
    participation = Participation(book)
    assert participation.counts() == counts
    participation.close()
    assert stat.S_IMODE(book.stat().st_mode) == 0o600
    marks = read_ledger(tmp_path / "run" / LEDGER_NAME)[0].releases
    assert [mark.contributors for mark in marks] == [
        len(witness.devices[n]) for n in range(1, len(marks) + 1)
    ]
    assert marks[-1].largest_participation == 2
    with pytest.raises(PrivacyError, match=r"the run ended at its participation cap after round "):
        run_here(nodes(), config=capped(rounds=30), resume=True)


def test_under_a_cap_epsilon_is_fixed_from_the_start(run_here: RunHere) -> None:
    """More rounds cost nobody more: two releases of the calibrated noise are the budget."""
    result = run_here(nodes(), config=capped(rounds=30))
    spent = [record.epsilon for record in result.info.history]
    assert spent[0] is not None
    assert spent[0] < 3.0
    assert spent[1] == spent[2] == spent[-1] == pytest.approx(4.0, abs=1e-3)
    assert spent[1] is not None
    assert spent[1] <= 4.0


def test_a_second_run_goes_on_counting(run_here: RunHere, tmp_path: Path) -> None:
    """The cap is the population's: what another run used is used."""
    config, book = capped(rounds=2, cap=2), tmp_path / "ledger.jsonl"
    first, second = Witness(), Witness()
    run = run_here(nodes(), config=config, audit=first, ledger_path=book, out="first")
    run_here(nodes(), config=config, audit=second, ledger_path=book, out="second")
    drawn = [*first.devices.values(), *second.devices.values()]
    assert max(Counter(device for part in drawn for device in part).values()) <= 2
    (tmp_path / PARTICIPATION_NAME).unlink()
    with pytest.raises(PrivacyError) as caught:
        run_here(nodes(), config=config, ledger_path=book, out="third")
    assert str(caught.value) == (
        f"{tmp_path / PARTICIPATION_NAME}: expected at least {len(first.devices[1])} devices in "
        f"round 1 of run {run.info.run_id}, as released, got 0. Restore the newest file that "
        "belongs to this population; without it no cap can be kept."
    )


def test_the_clip_adapts_and_its_price_is_charged(run_here: RunHere, tmp_path: Path) -> None:
    """Updates of norm about 1.6 under a first clip of 0.5: it rises; each round's own is charged.

    The release costs the stated noise multiplier although theta's own noise is larger.
    """
    config = central(rounds=25, adaptive_clip={"learning_rate": 0.5, "bit_noise": 4.0})
    witness, kept = Witness(), Steps()
    run_here(nodes(), config=config, audit=witness, hooks=[kept])
    clips = [facts.record.clip_norm for facts in kept.facts]
    assert clips[0] == CLIP
    assert clips[-1] > 2 * CLIP
    charges = [c.charge for c in read_ledger(tmp_path / "run" / LEDGER_NAME)[0].charges]
    assert [charge.clip_norm for charge in charges] == clips
    theta = (Z**-2 - (2 * 4.0) ** -2) ** -0.5
    for charge in charges:
        assert charge.noise_multiplier == pytest.approx(Z, rel=1e-8)
        assert charge.sigma == pytest.approx(theta * charge.clip_norm, rel=1e-8)
        assert charge.num_values == fake_farm.NUM_VALUES + 1
    noise = np.concatenate(
        [
            (step * COHORT - witness.sums[n][: fake_farm.NUM_VALUES] * clip * 2.0**-30) / clip
            for n, (step, clip) in enumerate(zip(kept.steps, clips, strict=True), start=1)
        ]
    )
    assert abs(np.square(noise / theta).mean() - 1) < 6.1 * math.sqrt(2 / noise.size)


def test_metrics_are_told_with_their_noise_and_nothing_else_is(run_here: RunHere) -> None:
    """All fake devices say loss 0.5, hit@1 0.25, one example: without noise that is told."""
    kept = Steps()
    config = settings(mode="none", privacy={"metrics": {"max_loss": 2.0, "max_examples": 4}})
    run_here(nodes(), config=config, hooks=[kept])
    for facts in kept.facts:
        found = facts.record.metrics
        assert found is not None
        assert found.contributors == pytest.approx(facts.record.count)
        assert found.loss == pytest.approx(0.5, abs=1e-6)
        assert found.hit_at_1 == pytest.approx(0.25, abs=1e-6)
        assert found.examples == pytest.approx(1.0, abs=1e-6)
        assert found.noise == 0

    noisy = Steps()
    config = central(rounds=40, metrics={"max_loss": 2.0, "budget_share": 0.5})
    run_here(nodes(), config=config, hooks=[noisy], out="noisy")
    records = [facts.record for facts in noisy.facts]
    assert {(r.count, r.mean_loss, r.drawn) for r in records} == {(None, None, None)}
    counted = np.array([r.metrics.contributors for r in records if r.metrics is not None])
    noise = 2 * Z / math.sqrt(0.5)
    # 40 rounds of 12 expected devices: the mean is off by sampling (sd 2.7) and noise
    assert abs(counted.mean() - 12) < 6.1 * math.hypot(noise, 2.7) / math.sqrt(40)
    assert counted.std() > noise / 2


def test_a_projection_never_states_an_epsilon(run_here: RunHere, tmp_path: Path) -> None:
    """It has no ledger, and every statement says what it is."""
    config = settings(
        mode="projection",
        privacy={
            "epsilon": 2.0,
            "delta": 1e-5,
            "projection": {"population": 16_000, "cohort": 1_000},
        },
    )
    result = run_here(nodes(), config=config)
    assert result.epsilon is None
    assert [record.epsilon for record in result.info.history] == [None] * 3
    assert not (tmp_path / "run" / LEDGER_NAME).exists()
    assert result.info.noise_multiplier > 0.3
    assert privacy_statement(result.info) == [
        (
            "PROJECTION, no guarantee: trained with the noise that a population of 16000 with "
            "cohorts of 1000 would need for epsilon 2 at delta 1e-05. No epsilon was achieved for "
            "the 30 devices that trained here."
        )
    ]


def test_nothing_without_noise_is_left_on_disk(run_here: RunHere, tmp_path: Path) -> None:
    """Neither the sum nor what it would have made of theta: in no file of the run."""
    witness, kept = Witness(), Steps()
    run_here(nodes(), config=central(rounds=2), audit=witness, hooks=[kept])
    before = np.zeros(fake_farm.NUM_VALUES)
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for number, total in witness.sums.items():
        mean = total * (CLIP * 2.0**-30 / COHORT)
        unnoised = (before + mean).astype(np.float32)
        before = kept.facts[number - 1].theta.astype(np.float64)
        floats = (mean, mean * COHORT)
        singles = (unnoised, *(values.astype(np.float32) for values in floats))
        for raw in (total, total.astype(np.float64), *floats, *singles):
            for order in ("<", ">"):
                piece = raw.astype(raw.dtype.newbyteorder(order)).tobytes()[:64]
                assert not [data for data in files if piece in data]


def test_a_stale_file_of_participations_is_refused(run_here: RunHere, tmp_path: Path) -> None:
    """Also where a device was at its cap already when the copy was made."""
    saved = tmp_path / "saved"
    book = tmp_path / "run" / PARTICIPATION_NAME

    class Saves:
        def after_round(self, facts: RoundFacts) -> None:
            if facts.round_number == 3:
                saved.write_bytes(book.read_bytes())
            if facts.round_number == 4:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run_here(nodes(), config=capped(rounds=30), hooks=[Saves()])
    book.write_bytes(saved.read_bytes())
    with pytest.raises(PrivacyError, match=r"expected at least \d+ participations, as when the"):
        run_here(nodes(), config=capped(rounds=30), resume=True)


@pytest.mark.parametrize("mode", ["none", "example_level"])
def test_a_ledger_is_for_rounds_that_are_charged(
    run_here: RunHere, tmp_path: Path, mode: str
) -> None:
    """A population with a promise gets no run that releases without it."""
    config = settings(mode="none")
    if mode == "example_level":
        config = config.model_copy(
            update={"privacy": config.privacy.model_copy(update={"mode": mode})}
        )
    asked = nodes()
    with pytest.raises(PrivacyError) as caught:
        run_here(asked, config=config, ledger_path=tmp_path / "book.jsonl")
    assert str(caught.value) == (
        f"{tmp_path / 'book.jsonl'}: expected privacy.mode 'central' for a population with a "
        f"ledger, got {mode!r}, which would release what nobody charges. Leave out the ledger if "
        "the devices are imagined for this run."
    )
    assert not any(node.tasks for node in asked.values())


def test_a_run_that_ends_early_keeps_its_last_theta(run_here: RunHere) -> None:
    """Although it is none of every tenth."""
    result = run_here(nodes(), config=central(rounds=9, epsilon=0.45), keep_every=10)
    assert (result.info.round_number, result.info.ended) == (4, "budget")
    assert result.theta_path.exists()


def test_a_budget_that_no_accountant_can_state_ends_the_run(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleanly, like one that is reached."""

    def stated(releases: list[object], *, delta: float) -> Epsilon:
        if len(releases) > 2:
            raise PrivacyError("too much for the accountant")
        return Epsilon(value=0.1, delta=delta, method="prv")

    monkeypatch.setattr(ledger, "epsilon_of", stated)
    result = run_here(nodes(), config=central(rounds=9))
    assert (result.info.round_number, result.info.ended) == (2, "budget")


def test_a_diverged_round_is_never_noised_again(run_here: RunHere, tmp_path: Path) -> None:
    """That it diverged tells of the sum, so it counts as released, and tells no more."""
    config = central(rounds=3).model_copy(update={"server": SgdConfig(learning_rate=1e43)})
    with pytest.raises(ThetaError) as caught:
        run_here(nodes(), config=config)
    assert str(caught.value) == (
        "round 1: expected a finite theta after the server's step, got one that is not. The round "
        "is charged and counts as released, so this run cannot go on. Lower server.learning_rate "
        "in a new one."
    )
    assert len(read_ledger(tmp_path / "run" / LEDGER_NAME)[0].releases) == 1
    with pytest.raises(PrivacyError, match="expected no release after round 0, the checkpoint's"):
        run_here(nodes(), config=config, resume=True)


@pytest.mark.parametrize(
    ("value", "digits", "told"), [(1.2349, 2, "1.24"), (0.0049, 2, "0.01"), (2.0, 3, "2.000")]
)
def test_an_upper_bound_is_rounded_up(value: float, digits: int, told: str) -> None:
    """Rounded to the nearest it could be less than it is."""
    assert rounded_up(value, digits) == told
