"""What sides and shapes are called; without torch, which takes seconds to import."""

from __future__ import annotations

import dataclasses
import re
from typing import Self

from carpool.errors import ConfigError
from carpool.schema import nearest

CARPOOL = "carpool"
PLAIN = "carpool, not clipped"
HEAD_ONLY = "carpool, head only"
EAGER = "eager"
COMPILED = "torch.compile"
OPACUS = "Opacus, clipped"
PORTABLE = "stock ExecuTorch, portable"
XNNPACK = "stock ExecuTorch, XNNPACK"

PEERS = ("carpool", "eager", "compile", "opacus", "stock")
"""For ``--peers``."""

L2_CLIP_NORM = 1.0
"""Of the clipped sides, over the whole of theta in its own units."""


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Rows and the longest row's tokens."""

    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``8x32``.

        Raises:
            ConfigError: anything else.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
        if found is None:
            raise ConfigError(f"--shapes: expected BATCHxLENGTH such as 8x32, got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        return f"{self.batch}x{self.length}"


def parse_peers(text: str) -> tuple[str, ...]:
    """From ``carpool,eager``.

    Raises:
        ConfigError: an unknown one.
    """
    peers = tuple(part.strip() for part in text.split(","))
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"--peers: unknown {peer!r}{nearest(peer, PEERS)}")
    return peers
