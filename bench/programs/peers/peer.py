"""What a side is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

AGREES = 1e-5
"""Largest difference of a side's gradient, of the largest value, and of its loss. A few times
what float32 costs; a step that differs in anything is off by powers of ten more."""


class Ready(NamedTuple):
    """A side that can be called.

    Attributes:
        step: takes the step; this is what is timed.
        read: the loss, one value, and the gradient, shape of theta and in its units, from what
            ``step`` returned.
    """

    step: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to take the step.

    Attributes:
        name: a row of the table; its fastest variant stands for it.
        variant: what sets it apart from others of this name.
        threads: PyTorch's or ExecuTorch's, whichever computes.
        make: prepares it for one step; may fail in any way.
        clipped: whether each row's gradient is clipped.
        agrees: the largest difference from eager PyTorch in float64 with which it is timed.
        slow: so slow that it is called in one turn only.
    """

    name: str
    variant: str
    threads: int
    make: Callable[[], Ready]
    clipped: bool = False
    agrees: float = AGREES
    slow: bool = False

    @property
    def label(self) -> str:
        """Name, variant and threads."""
        return ", ".join(filter(None, (self.name, self.variant, f"{self.threads} threads")))
