"""What one device can do to a sum, whatever it sends: compared in integers, exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tasks import task_to

from carpool.errors import UpdateRejected
from carpool.privacy import MetricBounds
from carpool.protocol import GRID_BOUND
from carpool_server.aggregation import (
    ContributionBuilder,
    DeviceFacts,
    blocks_of,
    validate_contribution,
)

LENGTH = 12
BOUNDS = MetricBounds(max_loss=8.0, max_examples=16)
TASK = task_to("honest", "other", "x", clip_norm=0.5, norm_bit=True, metrics=BOUNDS)
HONEST = np.linspace(-0.1, 0.1, LENGTH, dtype=np.float32)

anything = hnp.arrays(np.float32, LENGTH, elements=st.floats(width=32))
spike = st.builds(
    lambda place, value: np.where(np.arange(LENGTH) == place, value, 0.0).astype(np.float32),
    st.integers(0, LENGTH - 1),
    st.floats(width=32),
)
flat = st.builds(lambda value: np.full(LENGTH, value, np.float32), st.floats(width=32))
denormal = hnp.arrays(np.float32, LENGTH, elements=st.floats(-(2.0**-126), 2.0**-126, width=32))
wrong_length = hnp.arrays(
    np.float32, st.integers(0, 40).filter(lambda n: n != LENGTH), elements=st.floats(width=32)
)
facts = st.builds(
    DeviceFacts,
    num_examples=st.integers(0, 2**62),
    mean_loss=st.floats(),
    hit_at_1=st.floats(),
)


def squared_norm(values: np.ndarray) -> int:
    """In Python's integers, which do not overflow."""
    return sum(value * value for value in values.tolist())


def with_honest(clip_norm: float = 0.5) -> ContributionBuilder:
    task = TASK.model_copy(update={"clip_norm": clip_norm})
    builder = ContributionBuilder(task, num_values=LENGTH)
    builder.add("honest", HONEST, DeviceFacts(num_examples=3, mean_loss=2.0, hit_at_1=0.5))
    return builder


@pytest.mark.filterwarnings("error")
@settings(max_examples=500, deadline=None)
@given(
    update=anything | spike | flat | denormal | wrong_length,
    facts=facts,
    clip_norm=st.sampled_from([1e-35, 1e-3, 0.5, 1e30]),
)
def test_no_device_moves_any_block_by_more_than_its_bound(
    update: np.ndarray, facts: DeviceFacts, clip_norm: float
) -> None:
    """Huge, NaN, inf, denormal, one coordinate, all equal, wrong length; refused ones by zero."""
    builder = with_honest(clip_norm)
    before = builder.build().total.copy()
    try:
        builder.add("x", update, facts)
        added = 1
    except UpdateRejected as error:
        assert error.reason in {"not-finite", "wrong-length"}  # noqa: PT017  it may pass, too
        added = 0
    after = builder.build()
    assert after.header.count == 1 + added
    moved = after.total - before
    for block, values in blocks_of(moved, TASK.blocks(LENGTH)).items():
        assert squared_norm(values) <= added * GRID_BOUND**2, block
    assert added == (update.size == LENGTH and np.isfinite(update).all())
    validate_contribution(after, task=builder._task, num_values=LENGTH, sender="s")


@settings(max_examples=100, deadline=None)
@given(updates=st.lists(anything, min_size=1, max_size=6))
def test_a_device_is_in_the_sum_once_however_often_it_sends(updates: list[np.ndarray]) -> None:
    """The first update that is taken stays; every other one changes nothing."""
    builder = with_honest()
    before = builder.build().total.copy()
    taken = 0
    for update in updates:
        so_far = builder.build().total.copy()
        try:
            builder.add("x", update, DeviceFacts())
            taken += 1
        except UpdateRejected as error:
            assert error.reason == ("repeated" if taken else "not-finite")  # noqa: PT017  same
            np.testing.assert_array_equal(builder.build().total, so_far)
    assert taken <= 1
    moved = blocks_of(builder.build().total - before, TASK.blocks(LENGTH))["theta"]
    assert squared_norm(moved) <= GRID_BOUND**2
    assert builder.build().header.count == 1 + taken


def test_a_device_that_was_not_asked_adds_nothing() -> None:
    """Named, with the reason that may be told."""
    builder = with_honest()
    before = builder.build().total.copy()
    with pytest.raises(UpdateRejected) as caught:
        builder.add("stranger", HONEST, DeviceFacts())
    assert str(caught.value) == (
        "device stranger: expected a device that the task asks, got another one."
    )
    assert caught.value.reason == "not-asked"
    np.testing.assert_array_equal(builder.build().total, before)


def test_a_refused_device_may_still_send_and_a_counted_one_is_not_refused() -> None:
    """The last word of a device that failed first and came back; the sum says who is in."""
    builder = with_honest()
    builder.refuse("x", "diverged")
    builder.refuse("honest", "diverged")
    assert builder.build().header.refused == {"x": "diverged"}
    builder.add("x", HONEST, DeviceFacts())
    header = builder.build().header
    assert (header.device_ids, header.refused) == (("honest", "x"), {})


@pytest.mark.parametrize(("length", "bit"), [(0.49, 1), (0.5, 1), (0.51, -1), (5.0, -1)])
def test_the_norms_bit_is_one_half_above_or_below_zero(length: float, bit: int) -> None:
    """1 when the norm is at most C, the right way round; as bit - 1/2, in halves."""
    builder = ContributionBuilder(TASK, num_values=LENGTH)
    builder.add("x", np.eye(LENGTH, dtype=np.float32)[0] * np.float32(length), DeviceFacts())
    blocks = blocks_of(builder.build().total, TASK.blocks(LENGTH))
    assert blocks["norm_bit"].tolist() == [bit * GRID_BOUND]


def test_metrics_are_clipped_and_centred() -> None:
    """contributors, loss of at most 8, hit@1, examples of at most 16; NaN is the middle."""
    rows = {
        "honest": DeviceFacts(num_examples=4, mean_loss=2.0, hit_at_1=1.0),
        "other": DeviceFacts(num_examples=99, mean_loss=99.0, hit_at_1=0.0),
        "x": DeviceFacts(num_examples=0, mean_loss=math.nan, hit_at_1=math.nan),
    }
    builder = ContributionBuilder(TASK, num_values=LENGTH)
    seen = []
    for device, said in rows.items():
        before = builder.build().total.copy()
        builder.add(device, HONEST, said)
        moved = blocks_of(builder.build().total - before, TASK.blocks(LENGTH))["metrics"]
        seen.append((moved / GRID_BOUND).tolist())
    assert seen == [[0.5, -0.25, 0.5, -0.25], [0.5, 0.5, -0.5, 0.5], [0.5, 0.0, 0.0, -0.5]]
