"""The bundle's own program in the plain ExecuTorch runtime."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.programs.names import CARPOOL, HEAD_ONLY, L2_CLIP_NORM, PLAIN
from bench.programs.peers.peer import Peer, Ready
from bench.programs.subject import Step, Subject
from carpool.recipe import PLAIN_GRADIENT_CLIP
from carpool_export.runner import LoadedProgram


def load(subject: Subject) -> LoadedProgram:
    """The bundle's training method; loaded once, because it packs its weights each time."""
    methods = subject.bundle.manifest.program.methods
    return LoadedProgram(subject.bundle.program_path, {"gradients": methods["gradients"]})


def peers(subject: Subject, program: LoadedProgram, step: Step, *, threads: int) -> Iterator[Peer]:
    """The step with clipping and without; of a bundle without adapter, with clipping alone."""
    yield _peer(HEAD_ONLY if _is_head_only(subject) else CARPOOL, subject, program, step, threads)
    if not _is_head_only(subject):
        yield _peer(PLAIN, subject, program, step, threads)


def _is_head_only(subject: Subject) -> bool:
    return subject.bundle.manifest.adapter.kind == "none"


def _peer(name: str, subject: Subject, program: LoadedProgram, step: Step, threads: int) -> Peer:
    clip = PLAIN_GRADIENT_CLIP if name == PLAIN else L2_CLIP_NORM
    inputs = {
        "theta": subject.theta,
        **subject.corpus,
        **step.batch.packed(),
        "labels": step.batch.labels,
        "example_weights": step.batch.example_weights,
        "l2_clip_norm": torch.tensor([clip]),
    }
    return Peer(
        name=name,
        variant=f"clip {clip:g}",
        threads=threads,
        clipped=name != PLAIN,
        make=lambda: Ready(lambda: program.call("gradients", inputs), tuple),
    )
