"""The bundle's program in the plain ExecuTorch runtime, behind checks the runtime leaves out."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from carpool.bundle import Bundle
from carpool.bundle.manifest import FROZEN_INPUTS, RuntimeRange
from carpool.errors import DeviceError
from carpool.native import return_large_blocks
from carpool.packing import PackedTokens
from carpool_device.batches import Batch
from carpool_device.inputs import check_inputs
from carpool_device.private import resize_thread_pool, start_thread_pool
from carpool_device.tokenizer import QueryTokenizer

_QUERY = {"token_ids", "token_rows", "token_positions", "slot_tokens"}
_KNOWN_INPUTS = {
    "gradients": {"theta", *FROZEN_INPUTS, *_QUERY, "labels", "example_weights", "l2_clip_norm"},
    "scores": {"theta", *FROZEN_INPUTS, *_QUERY},
    "embed": {"theta", *FROZEN_INPUTS, *_QUERY},
}
_KNOWN_OUTPUTS = {
    "gradients": ("loss", "gradient"),
    "scores": ("scores",),
    "embed": ("embeddings",),
}

Floats = NDArray[np.float32]


class DeviceProgram:
    """One loaded program, shared by all devices of a process. Get one with ``load``.

    The runtime's own errors name neither inputs nor bounds, and how long its inputs and outputs
    stay as they are differs between its versions and platforms. So every input is compared with
    the manifest before a call, all of them are given each time, and every output is copied
    before the next call. Calls from several threads follow each other.

    Guarantees: equal inputs give equal bits on one machine, whatever ran in between and
    however many threads the runtime uses.

    Attributes:
        bundle: what it was loaded from.
        tokenizer: the bundle's.
        documents: the catalogue, in the order of the scores.
        document_index: a document's place in the scores, by id.
        any_used: whether this process has called any program.
    """

    any_used: ClassVar[bool] = False

    _loaded: ClassVar[dict[str, DeviceProgram]] = {}
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer = QueryTokenizer.from_bundle(bundle)
        self.documents = bundle.documents()
        self.document_index = {doc.id: place for place, doc in enumerate(self.documents)}
        self._frozen = bundle.corpus()
        self._lock = threading.Lock()
        # Program and methods are kept together: a method outlives neither its program nor
        # the program its file.
        self._program_path = bundle.program_path
        self._program = _open_program(bundle, self._program_path)
        self._methods: dict[str, Any] = {}

    @classmethod
    def load(cls, bundle: Bundle) -> DeviceProgram:
        """The process's one program for this bundle, loaded at the first call.

        Methods are loaded when they are used, and one at a time: each packs the frozen weights
        for itself. Going from one to another takes a training step's time or two.

        Raises:
            DeviceError: another ExecuTorch version than the manifest allows, or a program
                that cannot be loaded or is not what the manifest says.
            BundleError: the tokenizer's, documents' or corpus file cannot be used.
        """
        with cls._loading:
            program = cls._loaded.get(bundle.id)
            if program is None:
                program = cls._loaded[bundle.id] = cls(bundle)
            return program

    @property
    def max_batch(self) -> int:
        """Most rows in one call."""
        return self.bundle.manifest.program.methods["gradients"].bounds["batch"].max

    def gradients(
        self,
        theta: Floats,
        batch: Batch,
        *,
        l2_clip_norm: float,
        frozen: Mapping[str, Floats] | None = None,
    ) -> tuple[float, Floats]:
        """Loss and gradient of one batch.

        Args:
            theta: float32, shape ``(P,)``.
            batch: within the manifest's bounds.
            l2_clip_norm: each example's gradient is first clipped to this L2 norm over theta;
                positive. ``carpool.recipe.PLAIN_GRADIENT_CLIP`` gives the plain gradient.
            frozen: the frozen inputs by name, instead of the bundle's own; with another number
                of documents, theta has as many values more or less as the manifest says.

        Returns:
            The weighted sum of the examples' losses, and float32 of shape ``(P,)``: the
            weighted sum of their clipped gradients.

        Raises:
            ThetaError: theta does not fit the bundle's layout.
            DeviceError: an input is out of bounds, or the runtime failed.
        """
        num_documents = len((self._frozen if frozen is None else frozen)["documents"])
        if batch.labels.size and not 0 <= batch.labels.min() <= batch.labels.max() < num_documents:
            raise DeviceError(
                f"gradients: expected labels in [0, {num_documents}), got "
                f"{batch.labels.min()} to {batch.labels.max()}."
            )
        if not 0 < l2_clip_norm < np.inf:
            raise DeviceError(f"gradients: expected l2_clip_norm > 0, got {l2_clip_norm}.")
        outputs = self._call(
            "gradients",
            theta,
            batch.tokens,
            frozen,
            {
                "labels": batch.labels,
                "example_weights": batch.example_weights,
                "l2_clip_norm": np.array([l2_clip_norm], dtype=np.float32),
            },
        )
        return float(outputs["loss"].reshape(-1)[0]), outputs["gradient"]

    def scores(
        self, theta: Floats, tokens: PackedTokens, *, frozen: Mapping[str, Floats] | None = None
    ) -> Floats:
        """Every document's score for each query; the higher, the better.

        Args:
            theta: float32, shape ``(P,)``.
            tokens: B queries, within the manifest's bounds.
            frozen: as for ``gradients``.

        Returns:
            float32, shape ``(B, N)``, in the catalogue's order.

        Raises:
            ThetaError: theta does not fit the bundle's layout.
            DeviceError: an input is out of bounds, or the runtime failed.
        """
        return self._call("scores", theta, tokens, frozen, {})["scores"]

    def embed(
        self, theta: Floats, tokens: PackedTokens, *, frozen: Mapping[str, Floats] | None = None
    ) -> Floats:
        """The texts' embeddings, after the adapter and before the head.

        With them an app can rank texts of its own. At theta = 0 they are the untrained model's.

        Args:
            theta: float32, shape ``(P,)``.
            tokens: B texts, within the manifest's bounds, which are wider than for queries.
            frozen: as for ``gradients``.

        Returns:
            float32, shape ``(B, d)``, each row of length 1 if the model normalises.

        Raises:
            ThetaError: theta does not fit the bundle's layout.
            DeviceError: an input is out of bounds, or the runtime failed.
        """
        return self._call("embed", theta, tokens, frozen, {})["embeddings"]

    def score_rows(
        self, theta: Floats, rows: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[list[int], Floats]]:
        """Scores any number of encoded queries, in batches of like length.

        Args:
            theta: float32, shape ``(P,)``.
            rows: as ``QueryTokenizer.encode`` gives them.

        Yields:
            The places in ``rows`` of a batch's queries, and their scores: float32, shape
            ``(len(places), N)``. Every place comes once; short queries come first.
        """
        for places in self.batches(rows):
            yield places, self.scores(theta, self.tokenizer.pack([rows[i] for i in places]))

    def batches(self, rows: Sequence[NDArray[np.int64]]) -> Iterator[list[int]]:
        """The places of any number of rows in batches of like length, short rows first."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].size)
        for start in range(0, len(order), self.max_batch):
            yield order[start : start + self.max_batch]

    def _call(
        self,
        name: str,
        theta: Floats,
        tokens: PackedTokens,
        frozen: Mapping[str, Floats] | None,
        values: Mapping[str, NDArray[Any]],
    ) -> dict[str, Floats]:
        import torch  # noqa: PLC0415  seconds to import; commands that run nothing skip it

        manifest = self.bundle.manifest
        if frozen is None:
            manifest.layout.check(theta, source=f"{name}: theta")
        else:
            self._check_values(name, theta, frozen)
        available: dict[str, NDArray[Any]] = {
            "theta": theta,
            **(self._frozen if frozen is None else frozen),
            **tokens.named(),
            **values,
        }
        method = manifest.program.methods[name]
        arrays = check_inputs(name, method, available)
        tensors = [torch.from_numpy(np.require(a, requirements=["C", "W"])) for a in arrays]
        with self._lock:
            try:
                results = self._loaded_method(name).execute(tensors)
            except RuntimeError as error:
                shapes = {s.name: a.shape for s, a in zip(method.inputs, arrays, strict=True)}
                raise DeviceError(
                    f"{name}: the ExecuTorch runtime failed for shapes {shapes}: {error}"
                ) from error
            if len(results) != len(method.outputs):
                raise DeviceError(
                    f"{name}: expected {len(method.outputs)} outputs, got {len(results)}."
                )
            return {
                spec.name: np.array(result.numpy(), dtype=np.float32, copy=True)
                for spec, result in zip(method.outputs, results, strict=True)
            }

    def _loaded_method(self, name: str) -> Any:  # noqa: ANN401  executorch has no type information
        """The method; another one's packed weights are given back first, with its program."""
        if name not in self._methods:
            DeviceProgram.any_used = True
            if self._methods or self._program is None:  # None: it could not be opened again
                self._methods, self._program = {}, None
                self._program = _load_program(self._program_path)
            self._methods[name] = self._program.load_method(name)
        return self._methods[name]

    def _check_values(self, name: str, theta: Floats, frozen: Mapping[str, Floats]) -> None:
        """Whether the program takes another catalogue, and theta is as long as that makes it."""
        manifest = self.bundle.manifest
        count = len(frozen["documents"])
        more = count - manifest.documents.count
        if more and "documents" not in manifest.program.methods["gradients"].bounds:
            raise DeviceError(
                f"{name}: expected {manifest.documents.count} documents, the number that this "
                f"program was made for, got {count}."
            )
        expected = manifest.layout.num_values + more * manifest.program.values_per_document
        if theta.shape != (expected,):
            raise DeviceError(
                f"{name}: expected a theta of {expected} values for {count} documents, got shape "
                f"{theta.shape}."
            )


def use_threads(count: int) -> None:
    """Lets the runtime use ``count`` threads in this process; by default it takes all cores.

    Changes the speed and no result. For processes that share a machine, such as a simulation's:
    to be called before any program is used, since a loaded method keeps the threads that it
    found (ExecuTorch 1.5.1 crashes when they are taken away).

    Raises:
        DeviceError: ``count`` is less than 1, a program has been used in this process, or this
            version of ExecuTorch cannot.
    """
    if count < 1:
        raise DeviceError(f"expected at least 1 thread, got {count}.")
    if DeviceProgram.any_used:
        raise DeviceError(
            f"expected use_threads({count}) before the first program is used, got it after. "
            "Call it when the process starts."
        )
    _runtime()
    resize_thread_pool(count)


def check_runtime_version(found: str, allowed: RuntimeRange) -> None:
    """Refuses a runtime outside ``allowed``; local and pre-release labels do not count.

    Raises:
        DeviceError: names the version and the range.
    """
    if not _release(allowed.at_least) <= _release(found) < _release(allowed.below):
        raise DeviceError(
            f"expected ExecuTorch {allowed.at_least} or later and below {allowed.below}, which "
            f"this bundle's program was exported for, got {found}. Install such a version, or "
            "export the bundle again."
        )


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    if numbers is None:
        raise DeviceError(f"expected a version such as 1.5.1, got {version!r}.")
    parts = [int(part) for part in numbers.group().split(".")]
    while parts and parts[-1] == 0:  # 1.5 and 1.5.0 are one version
        parts.pop()
    return tuple(parts)


@functools.cache
def _runtime() -> Any:  # noqa: ANN401  executorch has no type information
    """The process's ExecuTorch runtime; importing it takes seconds."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch and torchao log notices about each other on import
    try:
        with warnings.catch_warnings():
            # executorch 1.5.1 announces that its Python API is experimental
            warnings.simplefilter("ignore")
            from executorch.runtime import Runtime  # noqa: PLC0415
    finally:
        logging.disable(previous)
    start_thread_pool()
    return_large_blocks()
    return Runtime.get()


def _load_program(path: Path) -> Any:  # noqa: ANN401  executorch has no type information
    try:
        return _runtime().load_program(path)
    except RuntimeError as error:
        raise DeviceError(f"{path}: the ExecuTorch runtime cannot load it: {error}") from error


def _open_program(bundle: Bundle, path: Path) -> Any:  # noqa: ANN401  same
    """Opens the ``.pte`` by path and compares it with the manifest."""
    manifest = bundle.manifest
    check_runtime_version(importlib.metadata.version("executorch"), manifest.program.runtime)
    program = _load_program(path)
    for name, known in _KNOWN_INPUTS.items():
        if name not in program.method_names:
            raise DeviceError(
                f"{path}: expected a method {name!r}, got {sorted(program.method_names)}."
            )
        method = manifest.program.methods[name]
        unknown = sorted({spec.name for spec in method.inputs} - known)
        if unknown:
            raise DeviceError(
                f"{path}: {name} takes inputs that this version of carpool does not know: "
                f"{', '.join(unknown)}. Update carpool."
            )
        outputs = tuple(spec.name for spec in method.outputs)
        if outputs != _KNOWN_OUTPUTS[name]:
            raise DeviceError(
                f"{path}: expected {name} to return {_KNOWN_OUTPUTS[name]}, got {outputs}."
            )
        found = program.metadata(name)
        counts = (found.num_inputs(), found.num_outputs())
        expected = (len(method.inputs), len(method.outputs))
        if counts != expected:
            raise DeviceError(
                f"{path}: {name}: expected {expected[0]} inputs and {expected[1]} outputs as in "
                f"the manifest, got {counts[0]} and {counts[1]}."
            )
    return program
