"""Opening a bundle: everything is checked before anything is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from carpool.bundle.manifest import FROZEN_INPUTS, SCHEMA_VERSION, Manifest
from carpool.bundle.weights import expand_once
from carpool.data.corpus import Document, read_documents
from carpool.errors import BundleError
from carpool.files import sha256_of_file
from carpool.schema import describe, without_twins
from carpool.theta import read_theta

MANIFEST_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle. Open one with ``Bundle.open``.

    Attributes:
        path: its folder.
        manifest: its parsed manifest.
        id: SHA-256 of the canonical manifest; thetas, checkpoints and tasks carry it.
    """

    path: Path
    manifest: Manifest
    id: str

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Reads the manifest and compares every file with it.

        Guarantees: on return every file the manifest lists had its size and SHA-256.

        Raises:
            BundleError: no bundle there, a manifest of another schema version or with a
                mistake, or a file that is missing, truncated or changed. Names the file,
                what was expected and what was found.
        """
        manifest = _read_manifest(path / MANIFEST_NAME)
        for name, entry in manifest.files.items():
            _check_file(path / name, expected_bytes=entry.bytes, expected_sha256=entry.sha256)
        return cls(path=path, manifest=manifest, id=manifest.id)

    @property
    def program_path(self) -> Path:
        """The ``.pte``; where its weights were shipped as int8, it is expanded now if need be.

        Raises:
            BundleError: it cannot be expanded, or not to what the manifest states.
        """
        program = self.manifest.program
        path = self.path / program.file
        if program.packed is not None:
            expand_once(self.path / program.packed.file, path, program.packed)
        return path

    @property
    def tokenizer_path(self) -> Path:
        """The Hugging Face ``tokenizer.json``."""
        return self.path / self.manifest.tokenizer.file

    def documents(self) -> list[Document]:
        """The catalogue, in the order of the scores."""
        return read_documents(self.path / self.manifest.documents.file)

    @property
    def theta_path(self) -> Path:
        """The theta that was shipped."""
        return self.path / self.manifest.theta_file

    def initial_theta(self) -> NDArray[np.float32]:
        """The theta that was shipped: float32, shape ``(num_values,)``; zeros at first."""
        return self.read_theta(self.theta_path)

    def read_theta(self, path: Path) -> NDArray[np.float32]:
        """A theta that was trained for this bundle, or the one that was shipped in it.

        Returns:
            float32, shape ``(num_values,)``, all finite.

        Raises:
            ThetaError: as ``carpool.theta.read_theta``.
        """
        shipped = path.exists() and path.samefile(self.theta_path)
        return read_theta(path, layout=self.manifest.layout, bundle_id=None if shipped else self.id)

    def corpus(self) -> dict[str, NDArray[np.float32]]:
        """The program's frozen inputs by name, in the order of the call.

        ``documents`` (N x d); for a core head ``basis`` (d x R); for a low-rank adapter
        ``adapter_down`` (a token embedding's dimension x R).

        Raises:
            BundleError: an array is missing or of another shape or dtype.
        """
        path = self.path / self.manifest.documents.corpus_file
        arrays = read_arrays(path)
        expected = {
            spec.name: tuple(
                size if isinstance(size, int) else self.manifest.documents.count
                for size in spec.shape
            )
            for spec in self.manifest.program.methods["gradients"].inputs
            if spec.name in FROZEN_INPUTS
        }
        corpus: dict[str, NDArray[np.float32]] = {}
        for name, shape in expected.items():
            found = arrays.get(name)
            if found is None or found.shape != shape or found.dtype != np.float32:
                got = "no such array" if found is None else f"{found.dtype} {found.shape}"
                raise BundleError(f"{path}: expected {name} of float32 {shape}, got {got}.")
            corpus[name] = found.astype(np.float32, copy=False)
        return corpus

    def golden(self) -> tuple[dict[str, NDArray[np.generic]], list[str]]:
        """The golden step's arrays by name, and the texts its token ids come from.

        Raises:
            BundleError: the file cannot be read as safetensors.
        """
        path = self.path / self.manifest.golden.file
        arrays = read_arrays(path)
        with safe_open(path, framework="numpy") as file:
            texts = json.loads((file.metadata() or {}).get("texts", "[]"))
        return arrays, texts


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """All arrays of a safetensors file by name.

    Raises:
        BundleError: the file cannot be read as safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype numpy has not
        raise BundleError(f"{path}: expected safetensors, got: {error}") from error


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_bytes(), object_pairs_hook=without_twins)
    except FileNotFoundError as error:
        raise BundleError(
            f"{path.parent}: expected a bundle with a {path.name}, found none. "
            "Make one with `carpool export`."
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: expected JSON, got: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {version!r}. "
            "Export the bundle again with this version of carpool, or use the version it came from."
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise BundleError(f"{path}: {describe(error, Manifest)}") from error
    if manifest.layout_id != manifest.layout.id:
        raise BundleError(
            f"{path}: expected layout id {manifest.layout.id}, got {manifest.layout_id}."
        )
    return manifest


def _check_file(path: Path, *, expected_bytes: int, expected_sha256: str) -> None:
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError as error:
        raise BundleError(
            f"{path}: expected {expected_bytes} bytes, found no file. Copy the bundle again."
        ) from error
    if not path.is_file():
        raise BundleError(f"{path}: expected a file, found a directory. Copy the bundle again.")
    if found_bytes != expected_bytes:
        raise BundleError(
            f"{path}: expected {expected_bytes} bytes, found {found_bytes}. Copy the bundle again."
        )
    found_sha256 = sha256_of_file(path)
    if found_sha256 != expected_sha256:
        raise BundleError(
            f"{path}: expected SHA-256 {expected_sha256}, found {found_sha256}. "
            "Copy the bundle again."
        )
