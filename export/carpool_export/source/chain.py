"""A sentence-transformers folder's own account of itself: modules, pooling, prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from carpool.errors import ExportError
from carpool_export.model import Dense, Pooling, Readout
from carpool_export.source.files import read_json

_POOLINGS: dict[str, Pooling] = {
    # by the old flags' names, and by the names since sentence-transformers 6
    "mean_tokens": "mean",
    "cls_token": "cls",
    "lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": False,
    "torch.nn.modules.activation.Tanh": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is put before a text.

    Attributes:
        query: before a query.
        document: before a document's passage.
    """

    query: str = ""
    document: str = ""


def read_chain(folder: Path) -> Readout:
    """What follows the transformer, as ``modules.json`` says.

    Raises:
        ExportError: a chain, pooling or activation that the program would not compute.
    """
    modules = read_json(folder / "modules.json")
    try:
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
        paths = [folder / str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise ExportError(
            f"{folder / 'modules.json'}: expected a list of modules with type and path, "
            f"got a module without {error}."
        ) from error
    normalized = names[-1:] == ["Normalize"]
    layers = names[2:-1] if normalized else names[2:]
    if names[:2] != ["Transformer", "Pooling"] or set(layers) - {"Dense"}:
        raise ExportError(
            f"{folder}: the modules {' + '.join(names)} are not supported; expected "
            "Transformer + Pooling, any number of Dense, and Normalize or not."
        )
    # Where the chain ends without it, a similarity by cosine divides by the lengths.
    settings = _settings(folder)
    return Readout(
        pooling=_pooling(paths[1]),
        dense=tuple(_dense(path) for path in paths[2 : 2 + len(layers)]),
        normalize=normalized or settings.get("similarity_fn_name") != "dot",
    )


def read_prompts(folder: Path) -> Prompts:
    """The prompts of ``config_sentence_transformers.json``, as its library uses them.

    Raises:
        ExportError: prompts that are no texts.
    """
    settings = _settings(folder)
    prompts = {
        name: text for name, text in (settings.get("prompts") or {}).items() if text is not None
    }
    if not all(isinstance(text, str) for text in prompts.values()):
        raise ExportError(
            f"{folder / 'config_sentence_transformers.json'}: prompts: expected texts by name, "
            f"got {prompts!r}."
        )
    default = str(prompts.get(settings.get("default_prompt_name") or "", ""))
    document = next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), default)
    return Prompts(query=prompts.get("query", default), document=document)


_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _pooling(folder: Path) -> Pooling:
    config = read_json(folder / "config.json")
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    flags = [
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    ]
    chosen = modes or flags
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ExportError(
            f"{folder}: pooling {' + '.join(chosen) or 'none'} is not supported; "
            "supported: one of mean, cls, lasttoken."
        )
    if config.get("include_prompt", True) is False:
        raise ExportError(f"{folder}: pooling that leaves out the prompt is not supported.")
    return _POOLINGS[chosen[0]]


def _dense(folder: Path) -> Dense:
    config = read_json(folder / "config.json")
    activation = config.get("activation_function")
    if activation not in _ACTIVATIONS:
        raise ExportError(
            f"{folder}: activation {activation!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}."
        )
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
        weight, bias = tensors["linear.weight"], tensors.get("linear.bias")
    except (OSError, KeyError) as error:
        raise ExportError(f"{path}: expected a linear.weight, got: {error}") from error
    return Dense(
        weight=weight.float(),
        bias=None if bias is None else bias.float(),
        tanh=_ACTIVATIONS[activation],
    )
