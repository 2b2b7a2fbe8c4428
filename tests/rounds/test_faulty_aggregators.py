"""What an aggregator may do wrong, and that it costs its own updates alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fake_farm
import numpy as np
import pytest
from fake_farm import NUM_VALUES, FakeAggregator, answer, contribution_to, dealt
from flwr.app import ConfigRecord, Error, Message, RecordDict
from round_kit import RunHere, Witness, settings

from carpool.errors import (
    CheckpointError,
    ConfigError,
    ContributionRejected,
    RoundFailed,
    RunStopped,
)
from carpool.protocol import RoundTask
from carpool_server.exchange import DESCRIBE
from carpool_server.hooks import RoundFacts
from carpool_server.in_process import LocalGrid

HONEST, FAULTY = 10, 11
PATIENT = settings(rounds=2, cohort={"quorum": 0.2, "deadline_seconds": 0.4, "extensions": 0})


def changed(**header: object) -> fake_farm.Lie:
    """The honest contribution with other header fields."""

    def lie(message: Message, task: RoundTask) -> Message:
        honest = contribution_to(task)
        new = honest.header.model_copy(update=header)
        return answer(message, dataclasses.replace(honest, header=new))

    return lie


def with_total(make: Callable[[np.ndarray], np.ndarray]) -> fake_farm.Lie:
    def lie(message: Message, task: RoundTask) -> Message:
        honest = contribution_to(task)
        return answer(message, dataclasses.replace(honest, total=make(honest.total)))

    return lie


def with_ids(make: Callable[[tuple[str, ...]], tuple[str, ...]]) -> fake_farm.Lie:
    def lie(message: Message, task: RoundTask) -> Message:
        honest = contribution_to(task)
        ids = make(honest.header.device_ids)
        new = honest.header.model_copy(update={"device_ids": ids, "count": len(ids)})
        return answer(message, dataclasses.replace(honest, header=new))

    return lie


def in_both(message: Message, task: RoundTask) -> Message:
    honest = contribution_to(task)
    refused = {honest.header.device_ids[0]: "diverged"}
    new = honest.header.model_copy(update={"refused": refused})
    return answer(message, dataclasses.replace(honest, header=new))


def content(record: RecordDict) -> fake_farm.Lie:
    return lambda message, _task: Message(record, reply_to=message)


def spike(total: np.ndarray) -> np.ndarray:
    return np.where(np.arange(NUM_VALUES) == 3, 1 << 40, total)


def long(total: np.ndarray) -> np.ndarray:
    return np.full_like(total, 1 << 31)  # each value alone is within the bound


def most_negative(total: np.ndarray) -> np.ndarray:
    return np.full_like(total, np.iinfo(np.int64).min)


# {n} is how many of the faulty aggregator's devices were drawn, {first} the first of them
LIES: dict[str, tuple[fake_farm.Lie, str]] = {
    "wrong length": (with_total(lambda t: t[:-1]), "expected a sum of 31 values, got 30."),
    "wrong count": (
        changed(count=99),
        "expected a count of {n}, as many as it names devices, got 99.",
    ),
    "value out of range": (
        with_total(spike),
        (
            "theta: expected values within {bound} grid units (of {n} clipped updates), "
            "got 1099511627776."
        ),
    ),
    "norm out of range": (
        with_total(long),
        (
            "theta: expected an L2 norm within {bound} grid units (of {n} clipped updates), "
            "got a larger one."
        ),
    ),
    "the most negative integer": (
        with_total(most_negative),
        (
            "theta: expected values within {bound} grid units (of {n} clipped updates), "
            "got 9223372036854775808."
        ),
    ),
    "a device twice": (
        with_ids(lambda ids: (ids[0], *ids)),
        "expected distinct devices, got '{first}' 2 times.",
    ),
    "a device not asked": (
        with_ids(lambda ids: (*ids, "dev-999")),
        "expected devices of its task alone, got 'dev-999', which was not asked of it.",
    ),
    "in the sum and refused": (
        in_both,
        "expected each device in the sum or refused, got '{first}' in both.",
    ),
    "from nobody, but not zero": (
        changed(device_ids=(), count=0),
        "theta: expected a sum of zeros from no device, got a value of {largest}.",
    ),
    "no loss": (
        changed(loss_sum=None),
        (
            "expected the training loss and the number of examples, which the task asked for, got "
            "None and {n}."
        ),
    ),
    "a loss that would overflow": (
        changed(loss_sum=1.7e308),
        "expected a loss of 0 to {n}e+06, of {n} devices, got 1.7e+308.",
    ),
    "a negative loss": (
        changed(loss_sum=-0.5),
        "expected a loss of 0 to {n}e+06, of {n} devices, got -0.5.",
    ),
    "another run": (changed(run_id="other"), "expected run_id {run_id}, got other."),
    "another round": (changed(round_number=7), "expected round_number 1, got 7."),
    "another bundle": (
        changed(bundle_id="c" * 64),
        f"expected bundle_id {'b' * 64}, got {'c' * 64}.",
    ),
    "another layout": (
        changed(layout_id="c" * 64),
        f"expected layout_id {fake_farm.LAYOUT.id}, got {'c' * 64}.",
    ),
    "an error": (
        lambda message, _task: Message(Error(code=3, reason="out of memory"), reply_to=message),
        "expected a contribution, got error 3: out of memory",
    ),
    "no record": (
        content(RecordDict()),
        (
            "expected a contribution, got expected a record 'carpool' with header and body as "
            "bytes, got []."
        ),
    ),
    "text where bytes belong": (
        content(RecordDict({"carpool": ConfigRecord({"header": "x", "body": b""})})),
        (
            "expected a contribution, got expected a record 'carpool' with header and body as "
            "bytes, got ['carpool']."
        ),
    ),
    "garbage for a header": (
        content(RecordDict({"carpool": ConfigRecord({"header": b"{{{", "body": b""})})),
        (
            "ContributionHeader: value: Invalid JSON: key must be a string at line 1 column 2, "
            "got b'{{{{{{'"
        ),
    ),
    "half a value": (
        lambda message, task: Message(
            RecordDict(
                {
                    "carpool": ConfigRecord(
                        {"header": contribution_to(task).to_wire().header, "body": b"123"}
                    )
                }
            ),
            reply_to=message,
        ),
        "expected whole values of 8 bytes (<i8), got 3 bytes.",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name_and_the_run_goes_on(run_here: RunHere, name: str) -> None:
    """Each fault is reported with its sender, what was expected and what was found."""
    lie, message = LIES[name]
    first, second = dealt(30, parts=2)
    faulty = FakeAggregator(second, lie=lie)
    witness = Witness()
    result = run_here(
        {HONEST: FakeAggregator(first), FAULTY: faulty}, config=PATIENT, audit=witness
    )
    task = faulty.tasks[0]
    count = len(task.device_ids)
    assert count > 1
    honest = contribution_to(RoundTask(header=task, theta=np.zeros(NUM_VALUES, dtype=np.float32)))
    expected = message.format(
        n=count,
        bound=count << 30,
        first=task.device_ids[0],
        run_id=result.info.run_id,
        largest=np.abs(honest.total).max(),
    )
    record = result.info.history[0]
    assert record.rejected == (f"aggregator {FAULTY}: {expected}",)
    assert record.count == len(witness.devices[1]) == record.drawn - count
    assert set(witness.devices[1]) <= set(first)
    assert result.info.round_number == 2


def test_silence_costs_the_deadline_and_its_own_updates(run_here: RunHere) -> None:
    """An aggregator that never answers is left out once the deadline has passed."""
    first, second = dealt(30, parts=2)
    faulty = FakeAggregator(second, lie=lambda _message, _task: None)
    witness = Witness()
    result = run_here(
        {HONEST: FakeAggregator(first), FAULTY: faulty}, config=PATIENT, audit=witness
    )
    for record in result.info.history:
        assert record.seconds >= 0.4
        assert set(witness.devices[record.round_number]) <= set(first)


def test_a_late_reply_is_in_no_later_round(run_here: RunHere) -> None:
    """A reply that comes after its round was closed is ignored, and the next one is not hurt."""
    first, second = dealt(30, parts=2)
    late: list[float] = []

    def lie(message: Message, task: RoundTask) -> Message:
        if task.header.round_number == 1:
            time.sleep(1.3)  # the deadline is 1 s
            late.append(time.monotonic())
        return answer(message, contribution_to(task))

    witness = Witness()

    def slow_in_round_2(message: Message, task: RoundTask) -> Message:
        if task.header.round_number == 2:
            time.sleep(0.5)  # so that the late reply arrives while round 2 waits
        return answer(message, contribution_to(task))

    nodes = {
        HONEST: FakeAggregator(first, lie=slow_in_round_2),
        FAULTY: FakeAggregator(second, lie=lie),
    }
    config = settings(rounds=2, cohort={"quorum": 0.2, "deadline_seconds": 1.0})
    result = run_here(nodes, config=config, audit=witness)
    assert late
    assert set(witness.devices[1]) <= set(first)
    assert len(witness.devices[2]) == result.info.history[1].drawn
    assert all(record.rejected == () for record in result.info.history)


def test_a_blocked_pull_keeps_nobody_else_waiting_and_its_reply_enters_no_later_round(
    run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply whose upload broke off blocks its own pull, and may come out a round too late."""
    first, second = dealt(30, parts=2)
    release = threading.Event()
    pull = LocalGrid.pull_messages

    def blocking(self: LocalGrid, message_ids: list[str]) -> list[Message]:
        replies = list(pull(self, message_ids))
        for reply in replies:
            if reply.metadata.src_node_id == FAULTY and reply.metadata.message_type != DESCRIBE:
                release.wait(20)
        return replies

    def slow(message: Message, task: RoundTask) -> Message:
        if task.header.round_number == 2:
            release.set()
            time.sleep(0.3)  # the old reply comes out while round 2 waits
        return answer(message, contribution_to(task))

    monkeypatch.setattr(LocalGrid, "pull_messages", blocking)
    nodes = {HONEST: FakeAggregator(first, lie=slow), FAULTY: FakeAggregator(second)}
    config = settings(rounds=2, cohort={"quorum": 0.2, "deadline_seconds": 1.0})
    start = time.monotonic()
    result = run_here(nodes, config=config)
    assert time.monotonic() - start < 5
    one, two = result.info.history
    assert one.count < one.drawn
    assert two.count == two.drawn
    assert one.rejected == two.rejected == ()


def test_below_quorum_the_round_is_extended_and_failed_aggregators_are_asked_again(
    run_here: RunHere,
) -> None:
    """One that fails at first and then answers costs an extension and no update."""
    first, second = dealt(30, parts=2)
    calls: list[int] = []

    def lie(message: Message, task: RoundTask) -> Message:
        calls.append(task.header.round_number)
        if calls.count(1) == 1:
            return Message(Error(code=1, reason="not yet"), reply_to=message)
        return answer(message, contribution_to(task))

    config = settings(rounds=2, cohort={"quorum": 1.0})
    result = run_here(
        {HONEST: FakeAggregator(first), FAULTY: FakeAggregator(second, lie=lie)},
        config=config,
        out="failing",
    )
    healthy = run_here(
        {HONEST: FakeAggregator(first), FAULTY: FakeAggregator(second)}, config=config
    )
    assert [record.extensions for record in result.info.history] == [1, 0]
    assert result.info.history[0].rejected == (
        f"aggregator {FAULTY}: expected a contribution, got error 1: not yet",
    )
    assert result.theta.tobytes() == healthy.theta.tobytes()


def test_a_device_is_counted_once_when_a_slow_and_a_second_reply_both_come(
    run_here: RunHere,
) -> None:
    """After an extension the first reply counts, and the second is refused as a repetition."""
    first, second = dealt(30, parts=2)
    asked: list[RoundTask] = []
    both = threading.Event()

    def lie(message: Message, task: RoundTask) -> Message:
        asked.append(task)
        if len(asked) == 1:
            both.wait(5)  # answers only once it was asked again
            return answer(message, contribution_to(task))
        both.set()
        time.sleep(0.3)
        return answer(message, contribution_to(task))

    def slow(message: Message, task: RoundTask) -> Message:
        if both.is_set() and len(asked) == 2:
            time.sleep(0.8)  # keeps the round open until the repetition has come
        return answer(message, contribution_to(task))

    third = fake_farm.devices(40)[30:]
    witness = Witness()

    def twice_slow(message: Message, task: RoundTask) -> Message:
        if len(asked) < 2:
            return Message(Error(code=1, reason="not yet"), reply_to=message)
        return slow(message, task)

    nodes = {
        HONEST: FakeAggregator(first),
        FAULTY: FakeAggregator(second, lie=lie),
        12: FakeAggregator(third, lie=twice_slow),
    }
    config = settings(
        rounds=1,
        cohort={"expected_size": 40.0, "quorum": 1.0, "deadline_seconds": 2.0, "extensions": 2},
    )
    result = run_here(nodes, config=config, audit=witness)
    assert sorted(witness.devices[1]) == sorted(fake_farm.devices(40))
    repeated = [m for m in result.info.history[0].rejected if "again" in m]
    assert repeated == [
        (
            f"aggregator {FAULTY}: expected devices that are not in the sum yet, "
            f"got '{min(second)}' again."
        )
    ]
    expected = contribution_to(
        RoundTask(
            header=asked[0].header.model_copy(update={"device_ids": fake_farm.devices(40)}),
            theta=asked[0].theta,
        )
    )
    np.testing.assert_array_equal(witness.sums[1], expected.total)


def test_a_device_that_two_aggregators_claim_is_asked_of_one_of_them(run_here: RunHere) -> None:
    """Both say they speak for everybody; each device's update is in the sum once."""
    everybody = fake_farm.devices(30)
    witness = Witness()
    nodes = {10: FakeAggregator(everybody), 11: FakeAggregator(everybody)}
    twice = run_here(nodes, audit=witness, out="twice")
    once = run_here({10: FakeAggregator(everybody)})
    assert twice.theta.tobytes() == once.theta.tobytes()
    assert nodes[11].tasks == []


def test_the_other_claimant_is_asked_when_the_first_is_dead(run_here: RunHere) -> None:
    """With the first one dead, the extension asks the second for the same devices."""
    everybody = fake_farm.devices(30)
    dead = FakeAggregator(everybody, lie=lambda _message, _task: None)
    config = settings(rounds=1, cohort={"deadline_seconds": 0.3})
    result = run_here({10: dead, 11: FakeAggregator(everybody)}, config=config, out="one-dead")
    healthy = run_here({10: FakeAggregator(everybody)}, config=config)
    assert result.theta.tobytes() == healthy.theta.tobytes()


def test_a_round_below_its_quorum_fails_whole_and_can_be_resumed(
    run_here: RunHere, tmp_path: Path
) -> None:
    """Nothing of it is released; resumed with healthy aggregators, the run ends as ever."""
    first, second = dealt(30, parts=2)

    def lie(message: Message, task: RoundTask) -> Message:
        if task.header.round_number == 2:
            return Message(Error(code=1, reason="gone"), reply_to=message)
        return answer(message, contribution_to(task))

    faulty = FakeAggregator(second, lie=lie)
    config = settings(cohort={"deadline_seconds": 2.0})
    with pytest.raises(RoundFailed) as caught:
        run_here({HONEST: FakeAggregator(first), FAULTY: faulty}, config=config)
    missing = len(faulty.tasks[-1].device_ids)
    assert str(caught.value) == (
        "round 2: expected updates of at least 80% of the drawn devices after 1 extensions of "
        f"2 s, got {8 - missing} of 8 (0 refused, 2 replies rejected, last: aggregator 11: "
        "expected a contribution, got error 1: gone). Nothing was released; resume it with "
        "--resume."
    )
    assert [p.name for p in tmp_path.glob("run/theta-*")] == ["theta-round-0001.safetensors"]
    healthy = {HONEST: FakeAggregator(first), FAULTY: FakeAggregator(second)}
    resumed = run_here(healthy, config=config, resume=True)
    assert resumed.theta.tobytes() == run_here(healthy, config=config, out="ever").theta.tobytes()


def test_devices_that_were_refused_are_not_asked_again(run_here: RunHere) -> None:
    """A quorum that refusals make impossible fails at once, without waiting for the deadline."""
    (everybody,) = dealt(30, parts=1)

    def lie(message: Message, task: RoundTask) -> Message:
        refused = dict.fromkeys(task.header.device_ids[:8], "diverged")
        return answer(message, contribution_to(task, refused=refused))

    aggregator = FakeAggregator(everybody, lie=lie)
    start = time.monotonic()
    with pytest.raises(RoundFailed, match=r"got 6 of 14 \(8 refused, 0 replies rejected\)"):
        run_here({HONEST: aggregator}, config=settings(cohort={"extensions": 3}))
    assert time.monotonic() - start < 3
    assert len(aggregator.tasks) == 1


def test_a_round_in_which_nobody_is_drawn_is_a_round(run_here: RunHere) -> None:
    """The sum of nobody is zero, whatever the quorum."""
    witness = Witness()
    (everybody,) = dealt(3, parts=1)
    config = settings(rounds=2, cohort={"expected_size": 1e-6, "quorum": 1.0})
    result = run_here({HONEST: FakeAggregator(everybody)}, config=config, audit=witness)
    assert [record.drawn for record in result.info.history] == [0, 0]
    assert not result.theta.any()
    assert not any(total.any() for total in witness.sums.values())


def test_an_aggregator_of_another_bundle_is_refused_before_the_first_round(
    run_here: RunHere,
) -> None:
    """It is named, with both ids."""
    first, second = dealt(30, parts=2)
    nodes = {HONEST: FakeAggregator(first), FAULTY: FakeAggregator(second, bundle_id="e" * 64)}
    with pytest.raises(ContributionRejected) as caught:
        run_here(nodes)
    assert str(caught.value) == (f"aggregator 11: expected the bundle {'b' * 64}, got {'e' * 64}.")
    assert caught.value.sender == "11"


def test_missing_aggregators_are_counted(run_here: RunHere) -> None:
    """The run does not begin with a part of its population."""
    with pytest.raises(RoundFailed) as caught:
        run_here({HONEST: FakeAggregator(("a",))}, aggregators=2, registration_seconds=0.3)
    assert str(caught.value) == (
        "before the first round: expected 2 aggregators within 0.3 s, got 1."
    )


def test_an_aggregator_that_does_not_say_its_devices_stops_the_start(run_here: RunHere) -> None:
    """The error says how many answered, and the last failure."""
    first, _second = dealt(30, parts=2)

    def failing(message: Message) -> Message:
        return Message(Error(code=2, reason="no data"), reply_to=message)

    with pytest.raises(RoundFailed) as caught:
        run_here({HONEST: FakeAggregator(first), FAULTY: failing}, registration_seconds=2.0)
    assert str(caught.value) == (
        "before the first round: expected 2 aggregators to say which devices they speak for "
        "within 2 s, got 1; aggregator 11: error 2: no data"
    )


@pytest.mark.parametrize("count", [29, 31])
def test_a_smaller_or_larger_population_is_refused_on_resume(
    run_here: RunHere, tmp_path: Path, count: int
) -> None:
    """The sampling rate belongs to the population that the run began with."""
    (everybody,) = dealt(30, parts=1)
    stop = threading.Event()

    class Stopping:
        def after_round(self, _facts: RoundFacts) -> None:
            stop.set()

    with pytest.raises(RunStopped, match=r"^stopped as asked; resume it with --resume\.$"):
        run_here({HONEST: FakeAggregator(everybody)}, hooks=[Stopping()], stop=stop)
    with pytest.raises(CheckpointError) as caught:
        run_here({HONEST: FakeAggregator(fake_farm.devices(count))}, resume=True)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'run'}: expected the population of the run that is resumed (30 devices, "
    )
    assert f"), got {count} devices, " in message
    assert message.endswith("Bring the same devices, or start a new run in another folder.")


def test_a_cohort_larger_than_the_population_names_both(run_here: RunHere) -> None:
    """No silent truncation of the sampling rate."""
    (everybody,) = dealt(5, parts=1)
    with pytest.raises(ConfigError) as caught:
        run_here({HONEST: FakeAggregator(everybody)})
    assert str(caught.value) == (
        "cohort.expected_size: expected at most the population of 5 devices, got 12. "
        "Lower it, or bring more devices."
    )
