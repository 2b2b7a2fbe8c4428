# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""The frozen encoder: its library's own code, with attention and masks that can be lowered.

Shape suffixes: B batch, H heads, T tokens, K a head's dimension, D embedding dimension.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AttentionInterface, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from carpool.errors import ExportError
from carpool_export.trainables.per_example import row_sum

MASKED = -1e9
"""Added to the attention logit of a padding token: its weight becomes exactly 0 in float32."""

_ATTENTION = "carpool_bmm"


def _bmm_attention(
    _module: torch.nn.Module,
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,  # noqa: ANN401  what other models pass to their attention
) -> tuple[Tensor, None]:
    """Attention as plain products; ``attention_mask`` is additive, float32, ``(B, 1, 1, T)``."""
    logits = torch.matmul(query_BHTK * scaling, key_BHTK.transpose(2, 3))
    weights = torch.softmax(logits + attention_mask, dim=-1)
    return torch.matmul(weights, value_BHTK).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _bmm_attention)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Token embeddings, frozen blocks, mean pooling and normalisation, ready for tracing."""

    model: PreTrainedModel

    def token_embeddings(self, input_ids_BT: Tensor) -> Tensor:
        """The embedding table's rows, float32 ``(B, T, D)``: what an adapter changes."""
        table: Tensor = self.model.get_input_embeddings()(input_ids_BT)
        return table

    def embed(self, soft_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The pooled embedding, scaled to length 1, float32 ``(B, D)``.

        A row whose mask is all zero gives the zero vector.
        """
        batch, length, width = soft_BTD.shape
        real_BT = mask_BT.to(torch.float32)
        states_BTD = self.model(
            inputs_embeds=soft_BTD,
            attention_mask=((1.0 - real_BT) * MASKED).view(batch, 1, 1, length),
            position_ids=torch.arange(length).view(1, length),
            token_type_ids=torch.zeros(1, length, dtype=torch.int64),
        ).last_hidden_state
        mean_weights_BT = real_BT / row_sum(real_BT).clamp(min=1.0)
        pooled_BD = torch.bmm(mean_weights_BT.view(batch, 1, length), states_BTD).view(batch, width)
        return pooled_BD * torch.rsqrt(row_sum(pooled_BD * pooled_BD) + 1e-24)


def load_model(
    folder: Path, *, attention: Literal["carpool_bmm", "eager", "sdpa"]
) -> PreTrainedModel:
    """The folder's model in float32, frozen, in evaluation mode.

    Args:
        folder: a Hugging Face model folder; nothing is fetched.
        attention: ``"carpool_bmm"`` for tracing, the library's own for comparison.

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
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    return model
