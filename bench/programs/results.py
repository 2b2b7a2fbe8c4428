"""What was measured, as it is stored."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from bench.programs.names import Shape
from carpool.errors import ConfigError
from carpool.machine import processor
from carpool.schema import Model, describe

PACKAGES = ("carpool", "executorch", "opacus", "torch", "transformers")


class Timing(Model):
    """One variant of one side.

    Attributes:
        peer: the side.
        variant: of the side.
        threads: PyTorch's or ExecuTorch's, whichever computes.
        clipped: whether each row's gradient is clipped.
        not_run: why there is no timing, or None.
        setup_seconds: to make it ready, first call included.
        gradient_difference: the largest, of the largest value in eager PyTorch in float64.
        loss_difference: likewise.
        median_seconds: of ``seconds``.
        seconds: of every counted call.
    """

    peer: str
    variant: str
    threads: int
    clipped: bool
    not_run: str | None = None
    setup_seconds: float | None = None
    gradient_difference: float | None = None
    loss_difference: float | None = None
    median_seconds: float | None = None
    seconds: tuple[float, ...] = ()


class ShapeResults(Model):
    """All sides at one shape; ``real_tokens`` is the share of the rectangle that is no padding."""

    batch: int
    length: int
    real_tokens: float
    timings: tuple[Timing, ...]

    @property
    def shape(self) -> Shape:
        """Rows and length."""
        return Shape(self.batch, self.length)

    def best(self, peer: str) -> Timing | None:
        """The side's fastest variant, if one ran."""
        ran = [t for t in self.timings if t.peer == peer and t.median_seconds is not None]
        return min(ran, key=_median, default=None)

    def ratio(self, peer: str, to: str) -> float | None:
        """Of the two sides' fastest variants."""
        one, other = self.best(peer), self.best(to)
        return _median(one) / _median(other) if one and other else None


class Machine(Model):
    """What it was measured on. ``load`` is the load average of the minute before."""

    processor: str
    cores: int
    load: float
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Self:
        """This one, now."""
        return cls(
            processor=processor(),
            cores=os.cpu_count() or 1,
            load=os.getloadavg()[0],
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
        )


class Results(Model):
    """One run of the benchmark."""

    model: str
    preset: str
    documents: int
    trained_values: int
    bundle_id: str
    machine: Machine
    clock: Literal["wall", "cpu"]
    threads: int
    repeats: int
    shortest: float
    shapes: tuple[ShapeResults, ...]

    @property
    def peers(self) -> list[str]:
        """The sides, in the order in which they came."""
        return list(dict.fromkeys(t.peer for s in self.shapes for t in s.timings))

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the file that ``--json`` wrote.

        Raises:
            ConfigError: it is not one.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: expected stored results, got: {error}") from error
        except ValidationError as error:
            raise ConfigError(
                f"{path}: expected results of `python -m bench.programs run --json`:\n"
                f"{describe(error, cls)}"
            ) from error


def not_run(results: Iterable[ShapeResults]) -> dict[tuple[str, str, str], list[Shape]]:
    """Which side's variant did not run, why, and at which shapes."""
    found: dict[tuple[str, str, str], list[Shape]] = {}
    for at_shape in results:
        for timing in at_shape.timings:
            if timing.not_run is not None:
                key = (timing.peer, timing.variant, timing.not_run)
                found.setdefault(key, []).append(at_shape.shape)
    return found


def _median(timing: Timing) -> float:
    if timing.median_seconds is None:
        raise ValueError(f"{timing.peer} did not run.")
    return timing.median_seconds
