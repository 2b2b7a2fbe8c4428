"""What a side is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


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
        slow: so slow that it is called in one turn only.
    """

    name: str
    variant: str
    threads: int
    make: Callable[[], Ready]
    clipped: bool = False
    slow: bool = False

    @property
    def label(self) -> str:
        """Name, variant and threads."""
        return ", ".join(filter(None, (self.name, self.variant, f"{self.threads} threads")))
