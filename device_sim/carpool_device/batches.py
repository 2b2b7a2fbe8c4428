"""Which examples a device trains on in a round, in which order, in which batches.

The order is a definition, not an implementation: a device in any language that follows it
takes the same steps. Version 1:

1. ``stream`` is ``carpool.randomness.words`` with purpose ``carpool/1/order``, the task's order
   key, the device id and the round. Every step below goes on where the last one stopped: no
   word is used twice, none is skipped.
2. The device's n examples stand in the order in which it holds them. ``first`` is
   ``shuffled(n, stream)``; the round's examples are its first k = min(n, max_examples)
   places, in that order.
3. Each epoch, the first one included, draws ``shuffled(k, stream)`` anew and visits the
   round's examples in that order.
4. An epoch is cut into batches of ``batch_size``; its last batch may be smaller.
5. With ``epochs`` that many epochs are run; with ``steps`` epochs follow each other until that
   many batches are done, the last epoch cut short where need be.

``shuffled(1, stream)`` draws nothing, so a device with one example uses no word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from carpool.packing import PackedTokens
from carpool.randomness import shuffled, words
from carpool.recipe import LocalRecipe
from carpool_device.tokenizer import QueryTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What one call of ``gradients`` is about.

    Attributes:
        tokens: B queries.
        labels: int64, shape ``(B,)``; the right document's place in the catalogue.
        example_weights: float32, shape ``(B,)``; 1 / B in training, 1 where noise is added to
            the sum; 0 makes a padding row.
    """

    tokens: PackedTokens
    labels: NDArray[np.int64]
    example_weights: NDArray[np.float32]


def make_batch(
    tokenizer: QueryTokenizer,
    rows: Sequence[NDArray[np.int64]],
    labels: Sequence[int],
    *,
    weight: float | None = None,
) -> Batch:
    """Packs encoded queries; each weighs ``weight``, or 1 / rows (in float32)."""
    each = np.float32(1) / np.float32(len(rows)) if weight is None else np.float32(weight)
    return Batch(
        tokens=tokenizer.pack(rows),
        labels=np.array(labels, dtype=np.int64),
        example_weights=np.full(len(rows), each, np.float32),
    )


def plan_batches(
    num_examples: int,
    *,
    recipe: LocalRecipe,
    order_key: bytes,
    device_id: str,
    round_number: int,
) -> Iterator[list[int]]:
    """The places of each batch's examples, batch by batch, as defined at the top.

    Args:
        num_examples: how many the device holds; at least 1.
        recipe: epochs or steps, batch size and most examples.
        order_key: the task's.
        device_id: whose order it is.
        round_number: of the task.
    """
    stream = words(
        purpose="carpool/1/order", key=order_key, device_id=device_id, round_number=round_number
    )
    chosen = shuffled(num_examples, stream)[: recipe.max_examples]
    num_batches = recipe.steps or (recipe.epochs or 0) * -(-len(chosen) // recipe.batch_size)
    while num_batches > 0:
        order = [chosen[i] for i in shuffled(len(chosen), stream)]
        for start in range(0, len(order), recipe.batch_size)[:num_batches]:
            yield order[start : start + recipe.batch_size]
            num_batches -= 1
