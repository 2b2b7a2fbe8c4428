"""The sentence-transformers files around a merged model: modules, pooling, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from carpool.bundle import Manifest
from carpool_export.model import Dense
from carpool_export.source import ModelSource

_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}


def write_chain(folder: Path, source: ModelSource, manifest: Manifest) -> None:
    """Writes what makes a model's folder a sentence-transformers folder that scores by dot product.

    With a document bias, a last dense layer appends the constant 1 that it is multiplied with.

    Args:
        folder: already holds the model and its tokenizer.
        source: the model before it was trained.
        manifest: the bundle's.
    """
    readout, prompts = source.readout, source.prompts
    prompt = manifest.tokenizer.query_prompt
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": manifest.tokenizer.max_length}
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "similarity_fn_name": "dot",
            "prompts": {"query": prompt, "document": prompts.document},
            "default_prompt_name": "query" if prompt else None,
        },
    )
    pooled = readout.dense[0].weight.shape[1] if readout.dense else source.width
    chain: list[tuple[str, Dense | dict[str, Any] | None]] = [
        ("Transformer", None),
        ("Pooling", {"word_embedding_dimension": pooled, _FLAGS[readout.pooling]: True}),
        *(("Dense", dense) for dense in readout.dense),
    ]
    if readout.normalize:
        chain.append(("Normalize", None))
    if manifest.head.document_bias:
        chain.append(("Dense", _append_one(source.width)))
    modules = []
    for index, (kind, content) in enumerate(chain):
        name = f"{index}_{kind}" if index else ""
        modules.append(
            {
                "idx": index,
                "name": str(index),
                "path": name,
                "type": f"sentence_transformers.models.{kind}",
            }
        )
        if name:
            (folder / name).mkdir()
        if isinstance(content, Dense):
            _write_dense(folder / name, content)
        elif content is not None:
            _write_json(folder / name / "config.json", content)
    _write_json(folder / "modules.json", modules)


def _append_one(width: int) -> Dense:
    return Dense(weight=torch.eye(width + 1, width), bias=torch.eye(width + 1)[width], tanh=False)


def _write_dense(folder: Path, dense: Dense) -> None:
    outputs, inputs = dense.weight.shape
    activation = "activation.Tanh" if dense.tanh else "linear.Identity"
    config = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": dense.bias is not None,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    _write_json(folder / "config.json", config)
    tensors = {"linear.weight": dense.weight.contiguous()}
    if dense.bias is not None:
        tensors["linear.bias"] = dense.bias.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401  any JSON value
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
