"""A model's folder, checked before any work: what cannot be exported is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from carpool.errors import ExportError
from carpool.files import sha256_of_file
from carpool.licences import spdx_of_card
from carpool_export.model import Pooling, Readout
from carpool_export.source.chain import Prompts, read_chain, read_prompts
from carpool_export.source.files import read_json
from carpool_export.source.find import find_model, found_revision

TOKENIZERS = ("WordPiece", "BPE", "Unigram")
"""Of ``tokenizer.json``: what a device can run. BPE over bytes alone."""

POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model folder whose configuration passed every check.

    Attributes:
        folder: where it is.
        name: as its model card calls it, else the folder's or package's name.
        architecture: Hugging Face ``model_type``.
        width: the embedding's dimension, D.
        token_width: a token embedding's dimension.
        vocabulary: number of token ids.
        max_positions: most tokens that it takes.
        tokenizer_kind: the model type in its ``tokenizer.json``.
        readout: how token states become an embedding.
        prompts: what is put before a text.
        licence: as its model card states it, an SPDX expression, or None.
        revision: a hub commit, or a package and its version; None of a folder.
    """

    folder: Path
    name: str
    architecture: str
    width: int
    token_width: int
    vocabulary: int
    max_positions: int
    tokenizer_kind: str
    readout: Readout
    prompts: Prompts
    licence: str | None
    revision: str | None

    @property
    def tokenizer_path(self) -> Path:
        """Its ``tokenizer.json``."""
        return self.folder / "tokenizer.json"

    def weights_sha256(self) -> str:
        """SHA-256 of its weight file; of several, of their names and hashes in order."""
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) == 1:
            return sha256_of_file(files[0])
        lines = "".join(f"{file.name} {sha256_of_file(file)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()


def open_source(
    model: str, *, revision: str | None = None, pooling: Pooling | None = None
) -> ModelSource:
    """Finds a model and refuses what cannot be exported.

    Args:
        model: a folder, an installed package or a hub id, as ``find_model`` takes them.
        revision: of a hub id.
        pooling: of a folder that is no sentence-transformers folder and so does not say.

    Raises:
        ExportError: nothing there, a file is missing or unreadable, or something in the
            configuration that the program could not do; names it.
    """
    folder = find_model(model, revision=revision)
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder}: expected a model folder with a tokenizer.json, found none.")
    if not any(folder.glob("*.safetensors")):
        raise ExportError(f"{folder}: expected a model folder with safetensors, found none.")
    config = _read_config(folder)
    readout = _readout(folder, pooling)
    title, licence = _read_card(folder / "README.md")
    # OPT's states leave it as wide as its tokens came in.
    hidden_key = "word_embed_proj_dim" if hasattr(config, "word_embed_proj_dim") else "hidden_size"
    hidden = _integer(folder, config, hidden_key)
    return ModelSource(
        folder=folder,
        name=title or (folder.name if Path(model).is_dir() else model),
        architecture=config.model_type,
        width=readout.dense[-1].weight.shape[0] if readout.dense else hidden,
        token_width=next(
            (size for key in _TOKEN_WIDTHS if isinstance(size := getattr(config, key, None), int)),
            hidden,
        ),
        vocabulary=_integer(folder, config, "vocab_size"),
        max_positions=_integer(folder, config, "max_position_embeddings"),
        tokenizer_kind=_tokenizer_kind(folder / "tokenizer.json"),
        readout=readout,
        prompts=read_prompts(folder),
        licence=licence and spdx_of_card(licence),
        revision=found_revision(model, folder),
    )


_TOKEN_WIDTHS = ("embedding_size", "word_embed_proj_dim")


def _read_config(folder: Path) -> Any:  # noqa: ANN401  one class per architecture
    """The library's configuration, once nothing in it is unsupported."""
    raw = read_json(folder / "config.json")
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"{folder}: model type {raw.get('model_type')!r} is not one that the installed "
            f"transformers knows: {str(error).strip().splitlines()[0]}"
        ) from error
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if _is_dict(v))}
    for found, what in (
        (config.is_encoder_decoder, "an encoder with a decoder"),
        (getattr(config, "attn_logit_softcapping", None), "a soft cap on attention logits"),
        (config.model_type == "gpt_oss", "attention sinks"),
        (getattr(config, "alibi", None), "ALiBi positions"),
        (kinds & {"dynamic", "longrope"}, "rotary positions that change with a text's length"),
    ):
        if found:
            raise ExportError(f"{folder}: {config.model_type} with {what} is not supported.")
    return config


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def is_chain(folder: Path) -> bool:
    """Whether it is a sentence-transformers folder, which says itself how it pools."""
    return (folder / "modules.json").is_file()


def _readout(folder: Path, pooling: Pooling | None) -> Readout:
    if is_chain(folder):
        if pooling is not None:
            raise ExportError(
                f"--pooling: {folder} says in its modules.json how it pools; expected none, got "
                f"{pooling!r}."
            )
        return read_chain(folder)
    if pooling is None:
        raise ExportError(
            f"{folder}: no modules.json says how token states become an embedding. Pass "
            "--pooling: mean or cls for most encoders, last for decoders."
        )
    if pooling not in POOLINGS:
        raise ExportError(f"--pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}.")
    return Readout(pooling=pooling)


def _tokenizer_kind(path: Path) -> str:
    raw = read_json(path)
    kind = (raw.get("model") or {}).get("type")
    if kind not in TOKENIZERS:
        raise ExportError(
            f"{path}: tokenizer {kind!r} is not supported; supported: {', '.join(TOKENIZERS)}."
        )
    splitter = raw.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    if kind == "BPE" and not any(step.get("type") == "ByteLevel" for step in steps):
        raise ExportError(f"{path}: a BPE tokenizer that is not over bytes is not supported.")
    return str(kind)


def _read_card(path: Path) -> tuple[str | None, str | None]:
    """Title and licence from a model card: its first heading, ``license:`` in its front matter."""
    if not path.is_file():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    title = re.search(r"^# +(\S.*?)\s*$", text, flags=re.MULTILINE)
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    licence = re.search(r"^license: *(\S+)", front[1], flags=re.MULTILINE) if front else None
    return (title[1] if title else None), (licence[1] if licence else None)


def _integer(folder: Path, config: Any, key: str) -> int:  # noqa: ANN401  one class per architecture
    value = getattr(config, key, None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ExportError(f"{folder / 'config.json'}: {key}: expected an integer, got {value!r}.")
    return value
