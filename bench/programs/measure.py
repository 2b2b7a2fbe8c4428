"""All sides at every shape: made ready, compared, timed in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from bench.programs.names import PEERS, Shape
from bench.programs.peers import Peer, Ready, carpool, eager, opacus_step, stock
from bench.programs.results import Machine, Results, ShapeResults, Timing
from bench.programs.subject import Step, Subject
from bench.programs.timing import CLOCKS, Runner, take_turns
from carpool.errors import ConfigError
from carpool_device.runtime import use_threads
from carpool_export.model import EAGER_ATTENTION
from carpool_export.parity import relative_error
from carpool_export.runner import LoadedProgram


class Settings(NamedTuple):
    """How it is measured; see the command's help."""

    peers: Sequence[str] = PEERS
    shortest: float = 0.5
    threads: int = 2
    repeats: int = 21
    clock: Literal["wall", "cpu"] = "wall"


class _Measured(NamedTuple):
    timing: Timing
    ready: Ready | None
    slow: bool


def measure(
    subject: Subject,
    head_only: Subject | None,
    shapes: Sequence[Shape],
    settings: Settings,
    announce: Callable[[str], None],
) -> Results:
    """Times every side at every shape.

    To be called once in a process, before any program is used: ExecuTorch's threads cannot be
    changed later.

    Args:
        subject: the bundle.
        head_only: a bundle of the same model and documents without adapter.
        shapes: within the bundles' bounds.
        settings: which sides, and how.
        announce: is told what is being done.

    Raises:
        ConfigError: a shape out of bounds, or a head-only bundle that is none.
    """
    for shape in shapes:
        for bundle in filter(None, (subject, head_only)):
            bundle.check(shape)
    if head_only is not None:
        _check_head_only(subject, head_only)
    machine = Machine.here()
    with TemporaryDirectory() as cache:
        # Nothing compiled before counts: torch.compile's times are those of a fresh machine.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        timed = tuple(_at_shapes(subject, head_only, shapes, settings, announce))
    manifest = subject.bundle.manifest
    return Results(
        model=manifest.model.name,
        preset=manifest.preset,
        documents=manifest.documents.count,
        trained_values=manifest.layout.num_values,
        bundle_id=subject.bundle.id,
        machine=machine,
        clock=settings.clock,
        threads=settings.threads,
        repeats=settings.repeats,
        shortest=settings.shortest,
        shapes=timed,
    )


def _at_shapes(
    subject: Subject,
    head_only: Subject | None,
    shapes: Sequence[Shape],
    settings: Settings,
    announce: Callable[[str], None],
) -> Iterator[ShapeResults]:
    use_threads(settings.threads)
    torch.set_num_threads(settings.threads)
    announce("loading")
    subjects = [subject] if head_only is None else [subject, head_only]
    exact = subject.load(attention=EAGER_ATTENTION).double()
    steps = [
        [each.step(shape, shortest=settings.shortest, exact=exact) for each in subjects]
        for shape in shapes
    ]
    del exact  # twice as large as the others
    programs = [(each, carpool.load(each)) for each in subjects]
    models = {attention: subject.load(attention=attention) for attention in eager.ATTENTIONS}
    for step in steps:
        yield _at_shape(programs, models, step, settings, announce)


def _check_head_only(subject: Subject, head_only: Subject) -> None:
    manifest, other = subject.bundle.manifest, head_only.bundle.manifest
    for what, expected, got in (
        ("adapter", "none", other.adapter.kind),
        ("model", manifest.model, other.model),
        ("number of documents", manifest.documents.count, other.documents.count),
    ):
        if expected != got:
            raise ConfigError(
                f"--head-only: expected a bundle with {what} {expected}, got {got}. Export it "
                "from the same model and documents with --adapter none."
            )


def _at_shape(
    programs: Sequence[tuple[Subject, LoadedProgram]],
    models: Mapping[str, PreTrainedModel],
    steps: Sequence[Step],
    settings: Settings,
    announce: Callable[[str], None],
) -> ShapeResults:
    torch.compiler.reset()  # what was compiled for another shape counts towards a limit
    step = steps[0]
    with TemporaryDirectory() as folder:
        measured = []
        for peer, expected in _peers(programs, models, steps, settings, Path(folder)):
            announce(f"{step.shape}: {peer.label}")
            measured.append(_prepare(peer, expected))
        announce(f"{step.shape}: timing")
        runners = [
            Runner(m.ready.step, m.timing.threads, m.slow) for m in measured if m.ready is not None
        ]
        seconds = iter(take_turns(runners, repeats=settings.repeats, clock=CLOCKS[settings.clock]))
        timings = [
            m.timing if m.ready is None else _timed(m.timing, next(seconds)) for m in measured
        ]
    return ShapeResults(
        batch=step.shape.batch,
        length=step.shape.length,
        real_tokens=float(step.batch.attention_mask.float().mean()),
        timings=tuple(timings),
    )


def _peers(
    programs: Sequence[tuple[Subject, LoadedProgram]],
    models: Mapping[str, PreTrainedModel],
    steps: Sequence[Step],
    settings: Settings,
    folder: Path,
) -> Iterator[tuple[Peer, Step]]:
    subject, step, threads = programs[0][0], steps[0], settings.threads
    makers: dict[str, Callable[[], Iterator[Peer]]] = {
        "eager": lambda: eager.eager_peers(subject, models, step, threads=threads),
        "compile": lambda: eager.compiled_peers(subject, models, step, threads=threads),
        "opacus": lambda: opacus_step.peers(subject, models, step, threads=threads),
        "stock": lambda: stock.peers(
            subject, models[EAGER_ATTENTION], step, threads=threads, folder=folder
        ),
    }
    if "carpool" in settings.peers:
        for (each, program), its_step in zip(programs, steps, strict=True):
            for peer in carpool.peers(each, program, its_step, threads=threads):
                yield peer, its_step
    for name, maker in makers.items():
        if name in settings.peers:
            for peer in maker():
                yield peer, step


def _prepare(peer: Peer, step: Step) -> _Measured:
    """Makes it ready, calls it once and compares."""
    torch.set_num_threads(peer.threads)
    start = time.perf_counter()
    timing = Timing(
        peer=peer.name, variant=peer.variant, threads=peer.threads, clipped=peer.clipped
    )
    try:
        ready = peer.make()
        output: Any = ready.step()
        setup = time.perf_counter() - start
        loss, gradient = ready.read(output)
    except Exception as error:  # noqa: BLE001  however a rival fails, that is its result
        return _Measured(timing.model_copy(update={"not_run": _first_line(error)}), None, peer.slow)
    gradient_difference = relative_error(gradient, step.clipped if peer.clipped else step.plain)
    loss_difference = relative_error(loss, step.loss)
    timing = timing.model_copy(
        update={
            "setup_seconds": setup,
            "gradient_difference": gradient_difference,
            "loss_difference": loss_difference,
        }
    )
    if not max(gradient_difference, loss_difference) <= peer.agrees:
        reason = f"another step: its gradient differs by {gradient_difference:.0e}"
        reason += f", its loss by {loss_difference:.0e}"
        return _Measured(timing.model_copy(update={"not_run": reason}), None, peer.slow)
    return _Measured(timing, ready, peer.slow)


def _timed(timing: Timing, seconds: Sequence[float]) -> Timing:
    return timing.model_copy(
        update={"median_seconds": statistics.median(seconds), "seconds": tuple(seconds)}
    )


def _first_line(error: Exception) -> str:
    """Of the error that everything else came from."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = str(root).strip().splitlines()
    return f"{type(root).__name__}: {lines[0] if lines else 'no message'}"
