# ruff: noqa: N803, N806  shape suffixes: the legend stands in the docstring
"""Attention for packed batches, under a name that the model library takes.

The library's models hand queries, keys and values of a batch of one to the function below; it
takes the rows apart, and puts the right mask on each. So no mask code of the library runs, and
nothing depends on what a model does with a mask.

Shape suffixes: B rows, T slots of a row, N tokens, H heads, G groups of heads with one key,
K a head's dimension.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from carpool.errors import ExportError
from carpool_export.model.packing import Packing, repeat_slots

PACKED_ATTENTION = "carpool_packed"
"""The name to load a model with; not in the library's table of masks, which leaves them to us."""

MASKED = -1e9
"""Added to the logit of a key that a query must not see: its weight is exactly 0 in float32."""

_WITHOUT_EFFECT = frozenset(
    {
        # training alone, or what is told again by the packing
        "cache_position",
        "deterministic",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Attending:
    """What attention must know beyond its arguments: the batch, and who sees whom."""

    packing: Packing
    causal: bool
    _masks: dict[tuple[int | None, int], Tensor] = dataclasses.field(default_factory=dict)

    def mask(self, window: int | None, shared: int) -> Tensor:
        """Additive: ``(B, 1, 1, T)``, or ``(B, 1, shared * T, T)`` where queries differ.

        Args:
            window: a query sees keys less than this many places away.
            shared: how many heads share a key.
        """
        if (window, shared) not in self._masks:  # every layer asks for one of very few
            self._masks[window, shared] = self._make_mask(window, shared)
        return self._masks[window, shared]

    def _make_mask(self, window: int | None, shared: int) -> Tensor:
        batch, length = self.packing.slots_BT.shape
        padding_B11T = ((1.0 - self.packing.mask_BT) * MASKED).view(batch, 1, 1, length)
        if not self.causal and window is None:
            return padding_B11T
        places = torch.arange(length)
        distance_TT = places.view(length, 1) - places.view(1, length)
        nearest = 0 if self.causal else 1 - (window or 0)
        unseen_TT = (distance_TT < nearest).to(torch.float32)
        if window is not None:
            unseen_TT = unseen_TT + (distance_TT >= window).to(torch.float32)
        unseen_TT = unseen_TT * MASKED
        return repeat_slots(padding_B11T + unseen_TT.view(1, 1, length, length), shared)


_ATTENDING: contextvars.ContextVar[Attending] = contextvars.ContextVar("attending")


@contextlib.contextmanager
def attending(packing: Packing, *, causal: bool) -> Iterator[Attending]:
    """While it is open, attention in this thread is over this batch."""
    opened = Attending(packing, causal)
    token = _ATTENDING.set(opened)
    try:
        yield opened
    finally:
        _ATTENDING.reset(token)


def packed_attention(  # noqa: PLR0917  the library's signature
    module: torch.nn.Module,
    query_1HNK: Tensor,
    key_1GNK: Tensor,
    value_1GNK: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slot_bias_1HTT: Tensor | None = None,
    **options: Any,  # noqa: ANN401  what else models hand to their attention
) -> tuple[Tensor, None]:
    """Attention within each row of the batch in ``attending``: ``(1, N, H, K)``.

    Raises:
        ExportError: the model hands over an argument that is not known here, or a mask.
    """
    current = _ATTENDING.get()
    _check(module, attention_mask, options)
    heads, groups = query_1HNK.shape[1], key_1GNK.shape[1]
    scale = query_1HNK.shape[-1] ** -0.5 if scaling is None else scaling
    query_BGSK = current.packing.split_heads(_tokens_first(query_1HNK * scale), groups=groups)
    key_BGTK = current.packing.split_heads(_tokens_first(key_1GNK), groups=groups)
    value_BGTK = current.packing.split_heads(_tokens_first(value_1GNK), groups=groups)
    logits_BGST = torch.matmul(query_BGSK, key_BGTK.transpose(2, 3))
    logits_BGST = logits_BGST + current.mask(sliding_window, heads // groups)
    if slot_bias_1HTT is not None:
        logits_BGST = logits_BGST + slot_bias_1HTT
    weights_BGST = torch.softmax(logits_BGST, dim=-1)
    mixed_BGSK = torch.matmul(weights_BGST, value_BGTK)
    return current.packing.merge_heads(mixed_BGSK, heads=heads).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _tokens_first(values_1HNK: Tensor) -> Tensor:
    _, heads, tokens, width = values_1HNK.shape
    return values_1HNK.transpose(1, 2).reshape(tokens, heads, width)


def _check(module: torch.nn.Module, mask: Tensor | None, options: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None:
        raise ExportError(
            f"{name} hands a mask of its own to attention (shape {tuple(mask.shape)}); "
            "supported: causal, sliding window and padding alone."
        )
    for option, value in options.items():
        if option not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise ExportError(f"{name} hands {option!r} to attention, which is not supported.")
