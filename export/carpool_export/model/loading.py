"""The model as the library has it, and what can be found out of it by trying."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from carpool.errors import ExportError
from carpool_export.model.encoder import Encoder, Readout
from carpool_export.model.packing import Packing
from carpool_export.model.weights import Weights, round_to_int8

EAGER_ATTENTION = "eager"
"""The library's own, to compare with."""

_PROBE_TOKENS = 5
_PROBE_TOLERANCE = 1e-4
"""Of the largest state; float32 alone is four powers of ten below it."""


def load_model(folder: Path, *, attention: str, weights: Weights = "float32") -> PreTrainedModel:
    """The folder's model in float32, frozen, in evaluation mode.

    Args:
        folder: a Hugging Face model folder; nothing is fetched.
        attention: ``PACKED_ATTENTION`` for tracing, the library's own for comparison.
        weights: int8 for weights that are rounded to it, in float32 none the less.

    Raises:
        ExportError: the weights cannot be read, or some of the model's are not among them.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModel.from_pretrained(
            folder,
            attn_implementation=attention,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder}: expected weights of its config.json, got: {error}") from error
    model, info = loaded
    # What is missing would be random. The pooler is not used.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ExportError(
            f"{folder}: {len(missing)} of the model's weights are not in model.safetensors, "
            f"among them {missing[0]}; expected all of them."
        )
    if weights == "int8":
        round_to_int8(model)
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    return model


def build_encoder(packed: PreTrainedModel, eager: PreTrainedModel, readout: Readout) -> Encoder:
    """An encoder over a model, with what the library's own copy of it shows when tried.

    Guarantees: on a probe, its embeddings of packed rows are those of the library's model.

    Args:
        packed: the model loaded with ``PACKED_ATTENTION``.
        eager: the same with one of the library's own attentions; float32.
        readout: what follows the blocks.

    Raises:
        ExportError: an argument to attention or a numbering of positions that is not known
            here, or an architecture that does something else between its tokens.
    """
    encoder = Encoder(
        model=packed,
        readout=readout,
        state_width=_states(eager, _probe(eager)).shape[-1],
        causal=is_causal(eager),
        first_position=first_position(eager),
        token_types=has_token_types(eager),
    )
    _check_on_probe(encoder, eager)
    return encoder


def _check_on_probe(encoder: Encoder, eager: PreTrainedModel) -> None:
    """Two rows, packed, of which one is shorter: does either see the other, or padding?"""
    whole = _probe(eager)[0]
    short = whole[2:]
    rows = torch.tensor([0] * len(whole) + [1] * len(short))
    positions = torch.cat([torch.arange(len(whole)), torch.arange(len(short))])
    slots = torch.full((2, len(whole)), -1)
    slots[rows, positions] = torch.arange(len(rows))
    with torch.no_grad():
        states = encoder.states(torch.cat([whole, short]), Packing(rows, positions, slots))
    expected = torch.cat([_states(eager, row.unsqueeze(0))[0] for row in (whole, short)])
    error = float((states - expected).abs().max() / expected.abs().max())
    if not error <= _PROBE_TOLERANCE:
        raise ExportError(
            f"{eager.config.model_type}: its tokens depend on each other outside attention, or on "
            f"the size of the batch: run on packed rows it is off by {error:.0e} of the largest "
            f"value; expected at most {_PROBE_TOLERANCE:.0e}. This architecture is not supported."
        )


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the first token's state is the same whatever comes after it."""
    tokens = _probe(model)
    changed = tokens.clone()
    changed[0, -1] = tokens[0, 0] - tokens[0, 1]  # no shift alone: a layer norm would take it out
    return torch.equal(_states(model, tokens)[0, 0], _states(model, changed)[0, 0])


def first_position(model: PreTrainedModel) -> int:
    """The position id of a row's first token, as the model numbers them when not told.

    Raises:
        ExportError: it is neither 0 nor the number after the padding token's.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 0
    tokens = _probe(model)
    expected = _states(model, tokens)
    pad = getattr(model.config, "pad_token_id", None)
    for first in (0, pad + 1) if isinstance(pad, int) and pad >= 0 else (0,):
        positions = torch.arange(first, first + _PROBE_TOKENS).view(1, -1)
        if torch.equal(_states(model, tokens, position_ids=positions), expected):
            return first
    raise ExportError(
        f"{model.config.model_type}: its position ids start neither at 0 nor after the padding "
        "token's id; expected one of both."
    )


def has_token_types(model: PreTrainedModel) -> bool:
    """Whether it has a type for each token, 0 when not told; GPT-2 takes types and has none."""
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return False
    tokens, types = _probe(model), torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    return torch.equal(_states(model, tokens, token_type_ids=types), _states(model, tokens))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    table: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    width = table.weight.shape[1]
    return torch.randn(1, _PROBE_TOKENS, width, generator=generator).to(table.weight.dtype)


def _states(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    mask = torch.ones(tokens.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        states: torch.Tensor = model(
            inputs_embeds=tokens, attention_mask=mask, **options
        ).last_hidden_state
    return states
