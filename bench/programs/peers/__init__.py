"""The sides, each of which takes the same step in its own way."""

from bench.programs.peers.peer import Peer, Ready

__all__ = ["Peer", "Ready"]
