"""Nothing is added before it was checked: what a contribution must be to enter the sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carpool.errors import ContributionRejected
from carpool.protocol import GRID_BOUND, Block, Contribution, TaskHeader
from carpool_server.aggregation.total import blocks_of

MAX_MEAN_LOSS = 1e6
"""Nats: far above any cross-entropy of logits that a device would still call finite training."""


def validate_contribution(
    contribution: Contribution, *, task: TaskHeader, num_values: int, sender: str
) -> None:
    """Refuses a contribution that does not answer its task or exceeds its bound.

    Guarantees: on return the sum is that of at most ``count`` distinct devices that were
    asked, and it is one that ``count`` clipped updates can have: the L2 norm of each of its
    blocks is at most ``count * 2**GRID_BITS`` grid units, compared exactly in integers.

    What it cannot see: an honest-looking sum within the bound. A lying aggregator has the
    influence of the devices it speaks for, and no more.

    Args:
        contribution: as it came in.
        task: what the sender was asked.
        num_values: theta's length.
        sender: who sent it, for the message.

    Raises:
        ContributionRejected: names the sender, what was expected and what was found.
    """
    header = contribution.header
    for name in ("run_id", "round_number", "bundle_id", "layout_id"):
        asked, found = getattr(task, name), getattr(header, name)
        if found != asked:
            raise ContributionRejected(f"expected {name} {asked}, got {found}.", sender=sender)
    sizes = task.blocks(num_values)
    expected = sum(sizes.values())
    if contribution.total.shape != (expected,):
        raise ContributionRejected(
            f"expected a sum of {expected} values, got {contribution.total.size}.", sender=sender
        )
    _validate_devices(contribution, task=task, sender=sender)
    for block, values in blocks_of(contribution.total, sizes).items():
        _validate_range(block, values, count=header.count, sender=sender)
    _validate_loss(contribution, task=task, sender=sender)


def _validate_loss(contribution: Contribution, *, task: TaskHeader, sender: str) -> None:
    header = contribution.header
    if not task.report_loss:
        if (header.num_examples, header.loss_sum) != (None, None):
            raise ContributionRejected(
                "expected no training loss and no number of examples: the task did not ask for "
                "them.",
                sender=sender,
            )
        return
    if header.num_examples is None or header.loss_sum is None:
        raise ContributionRejected(
            "expected the training loss and the number of examples, which the task asked for, got "
            f"{header.loss_sum} and {header.num_examples}.",
            sender=sender,
        )
    largest = header.count * MAX_MEAN_LOSS
    if not 0 <= header.loss_sum <= largest:
        raise ContributionRejected(
            f"expected a loss of 0 to {largest:g}, of {header.count} devices, got "
            f"{header.loss_sum:g}.",
            sender=sender,
        )


def _validate_devices(contribution: Contribution, *, task: TaskHeader, sender: str) -> None:
    header = contribution.header
    if header.count != len(header.device_ids):
        raise ContributionRejected(
            f"expected a count of {len(header.device_ids)}, as many as it names devices, "
            f"got {header.count}.",
            sender=sender,
        )
    distinct = set(header.device_ids)
    if len(distinct) != header.count:
        twice = min(i for i in distinct if header.device_ids.count(i) > 1)
        raise ContributionRejected(
            f"expected distinct devices, got {twice!r} {header.device_ids.count(twice)} times.",
            sender=sender,
        )
    unasked = (distinct | header.refused.keys()) - set(task.device_ids)
    if unasked:
        raise ContributionRejected(
            f"expected devices of its task alone, got {min(unasked)!r}, which was not asked of it.",
            sender=sender,
        )
    both = distinct & header.refused.keys()
    if both:
        raise ContributionRejected(
            f"expected each device in the sum or refused, got {min(both)!r} in both.",
            sender=sender,
        )


def _validate_range(block: Block, total: NDArray[np.int64], *, count: int, sender: str) -> None:
    # Python's integers: the squares do not fit 64 bits
    values = total.tolist()
    largest = max(map(abs, values))
    if count == 0 and largest:
        raise ContributionRejected(
            f"{block}: expected a sum of zeros from no device, got a value of {largest}.",
            sender=sender,
        )
    bound = count * GRID_BOUND
    if largest > bound:
        raise ContributionRejected(
            f"{block}: expected values within {bound} grid units (of {count} clipped updates), "
            f"got {largest}.",
            sender=sender,
        )
    if sum(value * value for value in values) > bound * bound:
        raise ContributionRejected(
            f"{block}: expected an L2 norm within {bound} grid units (of {count} clipped "
            "updates), got a larger one.",
            sender=sender,
        )
