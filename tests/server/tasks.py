"""A task as a coordinator would send it, without a coordinator."""

from __future__ import annotations

from carpool.protocol import TaskHeader
from carpool.recipe import LocalRecipe


def task_to(*device_ids: str, **changes: object) -> TaskHeader:
    """For these devices; ``changes`` are other fields."""
    plain = TaskHeader(
        run_id="r",
        round_number=1,
        bundle_id="b" * 64,
        layout_id="c" * 64,
        recipe=LocalRecipe(learning_rate=0.1, epochs=1),
        order_key="00",
        clip_norm=1.0,
        device_ids=device_ids,
        report_loss=False,
        norm_bit=False,
        metrics=None,
        participations=None,
    )
    return plain.model_copy(update=changes)
