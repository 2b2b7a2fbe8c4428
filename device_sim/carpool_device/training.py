"""One device's training in one round: the recipe, followed to the bit."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carpool.data.corpus import Example
from carpool.errors import DeviceError
from carpool.recipe import LocalRecipe
from carpool_device.batches import make_batch, plan_batches
from carpool_device.example_budget import ExampleBudget, ExampleSpending
from carpool_device.private_training import NoisyGradients
from carpool_device.runtime import DeviceProgram


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalUpdate:
    """What a device learned in a round.

    Attributes:
        update: float32, shape ``(P,)``: theta after training minus theta before, in theta's
            units, not clipped.
        num_examples: how many different examples were in a batch; None with the recipe's
            ``example_privacy``, because it is a fact about the examples without noise.
        mean_loss: mean cross-entropy (nats) over all rows of all batches, each at the theta
            of its step; None likewise.
        privacy: what an ``example_privacy`` cost: for the device's own books, not to be sent.
    """

    update: NDArray[np.float32]
    num_examples: int | None = None
    mean_loss: float | None = None
    privacy: ExampleSpending | None = None


def train_locally(
    program: DeviceProgram,
    examples: Sequence[Example],
    *,
    theta: NDArray[np.float32],
    recipe: LocalRecipe,
    order_key: bytes,
    device_id: str,
    round_number: int,
    budget: ExampleBudget | None = None,
) -> LocalUpdate:
    """Trains on a device's own examples as the recipe says.

    Guarantees: a function of its arguments alone: on one machine the same arguments give the
    same bits, whatever other devices do and however many threads run. ``theta`` is not
    changed. The order of examples is defined in ``carpool_device.batches``, the arithmetic in
    ``step``. With the recipe's ``example_privacy`` nothing can repeat it: draws and noise are
    the system's, as ``carpool_device.private_training`` says, and neither ``order_key`` nor
    ``round_number`` is used.

    Args:
        program: of the bundle that ``theta`` belongs to.
        examples: the device's, in the order in which it holds them.
        theta: float32, shape ``(P,)``: where training starts.
        recipe: what to do.
        order_key: the task's key of the order of examples.
        device_id: whose order it is; also names the device in errors.
        round_number: of the task, 0 or more.
        budget: what the device has spent; needed by ``example_privacy`` and else not looked at.
            The update's ``privacy.budget`` is the next one; its owner has stored it before this
            call, with ``ExampleBudget.charged``.

    Raises:
        ThetaError: theta does not fit the bundle's layout.
        DeviceError: no examples, an unknown document id, a recipe beyond the program's
            bounds, a loss or theta that is no longer finite, a privacy budget that is missing
            or spent, or the runtime failed.
    """
    layout = program.bundle.manifest.layout
    layout.check(theta, source=f"device {device_id}: theta")
    labels = _labels(program, examples, device_id=device_id)
    trained = layout.group_mask(recipe.train)
    if not trained.any():
        raise DeviceError(
            f"device {device_id}: expected a recipe that trains a part of this bundle's theta, got "
            f"train = {list(recipe.train)}; the bundle has "
            f"{sorted({segment.group for segment in layout.segments})}.",
            reason="recipe-not-supported",
        )
    gradients: _PlainGradients | NoisyGradients
    if recipe.example_privacy:
        gradients = NoisyGradients(
            program,
            rows=program.tokenizer.encode([example.query for example in examples]),
            labels=labels,
            recipe=recipe,
            trained=trained,
            budget=budget,
            device_id=device_id,
        )
    else:
        gradients = _PlainGradients(
            program,
            examples,
            labels,
            recipe=recipe,
            order_key=order_key,
            device_id=device_id,
            round_number=round_number,
        )
    current = theta
    for number in range(1, gradients.num_steps + 1):
        loss, gradient = gradients.at(current)
        current = step(current, gradient, start=theta, recipe=recipe, trained=trained)
        if not (math.isfinite(loss or 0.0) and np.isfinite(current).all()):
            told = "" if loss is None else f" (loss {loss})"
            raise DeviceError(
                f"device {device_id}: training diverged at step {number} of "
                f"{gradients.num_steps}{told}. Lower the recipe's learning rate, now "
                f"{recipe.learning_rate}.",
                reason="diverged",
            )
    update = current - theta
    if isinstance(gradients, NoisyGradients):
        return LocalUpdate(update=update, privacy=gradients.spending)
    return LocalUpdate(
        update=update, num_examples=gradients.num_examples, mean_loss=gradients.mean_loss()
    )


class _PlainGradients:
    """The gradients of one training without noise, batch after batch."""

    def __init__(
        self,
        program: DeviceProgram,
        examples: Sequence[Example],
        labels: Sequence[int],
        *,
        recipe: LocalRecipe,
        order_key: bytes,
        device_id: str,
        round_number: int,
    ) -> None:
        """Plans the batches and encodes what is in them."""
        if recipe.batch_size > program.max_batch:
            raise DeviceError(
                f"device {device_id}: expected a batch size of at most {program.max_batch}, which "
                f"the program takes, got {recipe.batch_size} in the recipe.",
                reason="recipe-not-supported",
            )
        self._plan = list(
            plan_batches(
                len(examples),
                recipe=recipe,
                order_key=order_key,
                device_id=device_id,
                round_number=round_number,
            )
        )
        used = sorted({place for places in self._plan for place in places})
        encoded = program.tokenizer.encode([examples[place].query for place in used])
        self._rows = dict(zip(used, encoded, strict=True))
        self._program, self._labels, self._clip = program, labels, recipe.l2_clip_norm
        self._losses: list[float] = []

    @property
    def num_steps(self) -> int:
        return len(self._plan)

    @property
    def num_examples(self) -> int:
        """How many different examples are in a batch."""
        return len(self._rows)

    def at(self, theta: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        """The next batch's loss and gradient."""
        places = self._plan[len(self._losses)]
        batch = make_batch(
            self._program.tokenizer,
            [self._rows[place] for place in places],
            [self._labels[place] for place in places],
        )
        loss, gradient = self._program.gradients(theta, batch, l2_clip_norm=self._clip)
        self._losses.append(loss)
        return loss, gradient

    def mean_loss(self) -> float:
        """Over all rows of all batches."""
        sizes = [len(places) for places in self._plan]
        return math.fsum(map(operator.mul, self._losses, sizes)) / sum(sizes)


def step(
    theta: NDArray[np.float32],
    gradient: NDArray[np.float32],
    *,
    start: NDArray[np.float32],
    recipe: LocalRecipe,
    trained: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Theta after one step of the update rule.

    The rule, for each value, in float32:

    1. only with a proximal weight mu > 0:  ``drift = theta - start``, ``pull = mu * drift``,
       ``gradient = gradient + pull`` (FedProx: Li et al., 2020, arXiv 1812.06127);
    2. ``gradient = 0`` where the value's group is not trained;
    3. ``move = learning_rate * gradient``;
    4. ``theta = theta - move``.

    Guarantees: every operation is rounded to float32 (to nearest, ties to even) before the
    next one; no multiplication is fused with an addition. mu and the learning rate are the
    recipe's values rounded to float32. So equal gradients give equal bits in every language.

    Args:
        theta: float32, shape ``(P,)``; not changed.
        gradient: float32, shape ``(P,)``; not changed.
        start: float32, shape ``(P,)``: theta at the start of the round.
        recipe: its learning rate and proximal weight are used.
        trained: bool, shape ``(P,)``: false where theta must stay as it is.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at what comes out
        if recipe.proximal_weight > 0:
            drift = np.subtract(theta, start)
            pull = np.multiply(np.float32(recipe.proximal_weight), drift)
            gradient = np.add(gradient, pull)
        gradient = np.where(trained, gradient, np.float32(0))
        move = np.multiply(np.float32(recipe.learning_rate), gradient)
        return np.subtract(theta, move)


def _labels(program: DeviceProgram, examples: Sequence[Example], *, device_id: str) -> list[int]:
    """Each example's document as its place in the catalogue."""
    if not examples:
        raise DeviceError(
            f"device {device_id}: expected at least one example, got none.", reason="no-examples"
        )
    labels = []
    for number, example in enumerate(examples, start=1):
        label = program.document_index.get(example.document)
        if label is None:
            raise DeviceError(
                f"device {device_id}: example {number} of {len(examples)}: unknown document id "
                f"{example.document!r}; expected one of the {len(program.document_index)} "
                f"documents of bundle {program.bundle.id[:12]}.",
                reason="unknown-document",
            )
        labels.append(label)
    return labels
