"""A model in one GGUF file becomes a model folder, once: its weights are expanded to float32."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from carpool.errors import ExportError
from carpool.files import sha256_of_file

_NEEDED = ("gguf", "accelerate")
"""What transformers reads such files with."""


def expanded_folder(path: Path) -> Path:
    """The file's model as a folder of ``config.json``, safetensors and ``tokenizer.json``.

    It lies in the hub library's cache for other libraries (``HF_ASSETS_CACHE``), under a name
    that depends on the file's bytes and on the version of transformers, and is made once.

    Args:
        path: a ``.gguf`` file with its tokenizer inside.

    Raises:
        ExportError: packages are missing, or the file is not one that transformers reads.
    """
    version = importlib.metadata.version("transformers")
    key = hashlib.sha256(f"{sha256_of_file(path)} {version}".encode()).hexdigest()[:24]
    cache = cached_assets_path(library_name="carpool", namespace="gguf")
    cache.mkdir(parents=True, exist_ok=True)
    folder: Path = cache / key / path.stem
    if not folder.is_dir():
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise ExportError(
                f"{path}: reading a GGUF file needs the packages {' and '.join(_NEEDED)}; missing: "
                f"{', '.join(missing)}. Install carpool[gguf]."
            )
        with tempfile.TemporaryDirectory(dir=cache) as staging:
            made = Path(staging) / path.stem
            made.mkdir()
            _expand(path, made)
            folder.parent.mkdir(exist_ok=True)
            if not folder.is_dir():  # another process may have been faster
                shutil.move(made, folder)
    return folder


def _expand(path: Path, folder: Path) -> None:
    """By hand, because the library refuses to save a model that it read from such a file."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
            model = AutoModel.from_pretrained(path.parent, dtype=torch.float32, **source)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    except Exception as error:  # whatever the library's reader stumbles over
        raise ExportError(
            f"{path}: expected a GGUF file that transformers reads, got: "
            f"{(str(error).strip().splitlines() or ['no message'])[0]}"
        ) from error
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, default=str, indent=1))
    tokenizer.save_pretrained(folder)
    licence = _licence(path)
    front = "" if licence is None else f"---\nlicense: {licence}\n---\n"
    (folder / "README.md").write_text(f"{front}# {path.stem}\n")


def _licence(path: Path) -> str | None:
    """What the file's own metadata states."""
    from gguf import GGUFReader  # noqa: PLC0415  an extra

    field = GGUFReader(path).get_field("general.license")
    return None if field is None else str(field.contents())
