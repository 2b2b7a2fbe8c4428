"""The golden step: does this device's runtime compute what the exporter's did?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carpool.errors import DeviceError
from carpool_device.batches import Batch
from carpool_device.runtime import DeviceProgram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the golden step.

    Attributes:
        name: ``"loss"``, ``"gradient"``, ``"scores"`` or ``"embed"``.
        error: largest absolute difference, as a share of the largest expected value.
        tolerance: the manifest's.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


def replay_golden_step(program: DeviceProgram) -> list[Check]:
    """Replays the bundle's golden step on this device and measures how far off it is.

    The token ids are made from the step's texts by this device's tokenizer and must be equal;
    all results have the manifest's tolerances. The result is returned whether
    or not it passed; ``require_passed`` decides.

    Raises:
        DeviceError: the token ids differ, or the golden step lacks an array.
    """
    arrays, texts = program.bundle.golden()
    frozen_names = tuple(program.bundle.corpus())
    expected = {name: _array(arrays, name, program) for name in (*_NAMES, *frozen_names)}
    tokens = program.tokenizer.pack(program.tokenizer.encode(texts))
    for name, found in tokens.named().items():
        if not np.array_equal(found, expected[name]):
            raise DeviceError(
                f"{program.bundle.tokenizer_path}: expected the golden step's {name} of shape "
                f"{expected[name].shape} from its {len(texts)} texts, got others (shape "
                f"{found.shape}). This device's tokenizer differs from the exporter's."
            )
    theta = expected["theta"].astype(np.float32, copy=False)
    frozen = {name: expected[name].astype(np.float32, copy=False) for name in frozen_names}
    batch = Batch(
        tokens=tokens,
        labels=expected["labels"].astype(np.int64, copy=False),
        example_weights=expected["example_weights"].astype(np.float32, copy=False),
    )
    clip = float(expected["l2_clip_norm"].reshape(-1)[0])
    loss, gradient = program.gradients(theta, batch, l2_clip_norm=clip, frozen=frozen)
    scores = program.scores(theta, tokens, frozen=frozen)
    embeddings = program.embed(theta, tokens, frozen=frozen)
    golden = program.bundle.manifest.golden
    return [
        _check("loss", np.array([loss]), expected["expected_loss"], golden.loss_tolerance),
        _check("gradient", gradient, expected["expected_gradient"], golden.gradient_tolerance),
        _check("scores", scores, expected["expected_scores"], golden.scores_tolerance),
        _check("embed", embeddings, expected["expected_embed"], golden.embed_tolerance),
    ]


def require_passed(checks: list[Check], *, program: DeviceProgram) -> None:
    """Refuses a device that computes something else.

    Raises:
        DeviceError: names every result out of tolerance, with error and tolerance.
    """
    failed = [f"{c.name} (error {c.error:.2g}, at most {c.tolerance:.2g})" for c in checks]
    failed = [text for text, check in zip(failed, checks, strict=True) if not check.passed]
    if failed:
        raise DeviceError(
            f"{program.bundle.program_path}: on this device the golden step is outside its "
            f"tolerance: {', '.join(failed)}. Do not train or search with this runtime."
        )


_NAMES = (
    "theta",
    "token_ids",
    "token_rows",
    "token_positions",
    "slot_tokens",
    "labels",
    "example_weights",
    "l2_clip_norm",
    "expected_loss",
    "expected_gradient",
    "expected_scores",
    "expected_embed",
)


def _array(
    arrays: dict[str, NDArray[np.generic]], name: str, program: DeviceProgram
) -> NDArray[Any]:
    if name not in arrays:
        path = program.bundle.path / program.bundle.manifest.golden.file
        raise DeviceError(f"{path}: expected an array {name!r}, got {sorted(arrays)}.")
    return arrays[name]


def _check(name: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> Check:
    if found.size != expected.size:
        raise DeviceError(
            f"golden step: expected {name} of shape {expected.shape}, got {found.shape}."
        )
    expected = expected.reshape(found.shape).astype(np.float64)
    difference = np.abs(found.astype(np.float64) - expected).max()
    return Check(name=name, error=float(difference / np.abs(expected).max()), tolerance=tolerance)
