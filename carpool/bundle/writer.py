"""Writing a bundle: it appears whole, after all its files are there, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carpool.bundle.manifest import FileEntry, Manifest
from carpool.bundle.reader import MANIFEST_NAME, Bundle
from carpool.errors import BundleError
from carpool.files import make_folder, sha256_of_file, sync_directory


def require_nothing_at(destination: Path) -> None:
    """Refuses a path where something is.

    Raises:
        BundleError: names it.
    """
    if destination.exists():
        raise BundleError(
            f"{destination}: expected a path where nothing is yet. "
            "Choose another, or remove it first."
        )


@contextmanager
def staging_folder(destination: Path) -> Iterator[Path]:
    """A folder beside ``destination`` to fill; it is removed unless it became the bundle.

    Raises:
        BundleError: ``destination`` is there already.
        FolderError: its parent cannot be made.
    """
    require_nothing_at(destination)
    make_folder(destination.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish_bundle(staging: Path, destination: Path, fields: dict[str, Any]) -> Bundle:
    """Hashes every file in ``staging``, writes the manifest, and moves it into place.

    Guarantees: ``destination`` appears with every file durable, or not at all.

    Args:
        staging: a folder from ``staging_folder`` with all files but the manifest.
        destination: where the bundle shall be.
        fields: the manifest's fields but ``files``, ``layout_id`` and ``signature``.

    Raises:
        pydantic.ValidationError: a field is wrong; nothing was moved.
        BundleError: something came to be at ``destination`` meanwhile; nothing was moved.
    """
    files = {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of_file(path))
        for path in sorted(staging.iterdir())
    }
    manifest = Manifest(**fields, layout_id=fields["layout"].id, files=files, signature=None)
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (staging / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.chmod(0o755)  # mkdtemp made it private
    sync_directory(staging)
    try:
        staging.rename(destination)
    except OSError as error:
        raise BundleError(
            f"{destination}: expected a path where nothing is yet, got: {error.strerror}."
        ) from error
    sync_directory(destination.parent)
    return Bundle(path=destination, manifest=manifest, id=manifest.id)
