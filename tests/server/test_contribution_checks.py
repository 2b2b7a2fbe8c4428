"""Bounds of a contribution that a run cannot reach by chance; the rest is in tests/rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tasks import task_to

from carpool.errors import ContributionRejected
from carpool.protocol import Contribution, ContributionHeader
from carpool_server.aggregation import validate_contribution

BOUND = 2**30
TASK = task_to("a", "b")


def contribution(
    values: list[int], *, count: int = 2, loss_sum: float | None = None
) -> Contribution:
    header = ContributionHeader(
        run_id="r",
        round_number=1,
        bundle_id="b" * 64,
        layout_id="c" * 64,
        device_ids=("a", "b")[:count],
        count=count,
        refused={},
        loss_sum=loss_sum,
    )
    return Contribution(header=header, total=np.array(values, dtype=np.int64))


def check(part: Contribution) -> None:
    validate_contribution(part, task=TASK, num_values=part.total.size, sender="7")


def test_the_longest_sum_two_devices_can_have_is_taken() -> None:
    """The norm may equal the bound: nobody honest is refused at the edge."""
    check(contribution([2 * BOUND, 0]))
    check(contribution([0, -2 * BOUND]))
    side = math.isqrt(2 * BOUND * BOUND)
    check(contribution([side, side]))


@pytest.mark.parametrize("values", [[2 * BOUND, 1], [-2 * BOUND, -1]])
def test_one_grid_unit_beyond_the_bound_is_refused(values: list[int]) -> None:
    """Exact, where float64 could not tell the two norms apart."""
    assert float(2 * BOUND) ** 2 == float(2 * BOUND) ** 2 + 1.0
    with pytest.raises(ContributionRejected) as caught:
        check(contribution(values))
    assert str(caught.value) == (
        "aggregator 7: theta: expected an L2 norm within 2147483648 grid units (of 2 clipped "
        "updates), got a larger one."
    )


def test_a_loss_that_was_not_asked_for_is_refused() -> None:
    """In a private mode it would be an exact number about somebody's text."""
    with pytest.raises(ContributionRejected) as caught:
        check(contribution([0, 0], loss_sum=1.5))
    assert str(caught.value) == (
        "aggregator 7: expected no training loss and no number of examples: the task did not ask "
        "for them."
    )


def test_nobody_with_zeros_is_taken() -> None:
    """All of an aggregator's devices may be refused."""
    check(contribution([0, 0], count=0))
