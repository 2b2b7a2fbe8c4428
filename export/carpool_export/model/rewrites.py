"""What is changed in the library's models before they are traced, each with its reason.

A rewrite leaves what the model computes as it is; the gate at the end of an export compares
with the model as the library has it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from carpool_export.model.attention import Attending, packed_attention
from carpool_export.reductions import constant


@contextlib.contextmanager
def rewritten(model: PreTrainedModel, current: Attending) -> Iterator[None]:
    """All rewrites that apply to the model, while it is open; not for several threads."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_rotation_as_product(model))
        stack.enter_context(_transposed_weights_as_product(model))
        if model.config.model_type == "mpnet":
            stack.enter_context(_relative_positions_of_slots(model, current))
        yield


@contextlib.contextmanager
def _rotation_as_product(model: PreTrainedModel) -> Iterator[None]:
    """Rotary positions: ``rotate_half(x)`` as ``x`` times a matrix of 0, 1 and -1.

    Why: it cuts activations in two and joins them again, and XNNPACK has no cutting of values
    that are computed; a small product it has, and it is exact.
    """
    modules: set[Any] = {sys.modules[type(module).__module__] for module in model.modules()}
    saved = [(module, module.rotate_half) for module in modules if hasattr(module, "rotate_half")]
    for module, _ in saved:
        module.rotate_half = _rotate_half
    try:
        yield
    finally:
        for module, original in saved:
            module.rotate_half = original


def _rotate_half(values: Tensor) -> Tensor:
    """``(-second half, first half)`` of the last dimension."""
    return functional.linear(values, _rotation(values.shape[-1]).to(values.dtype))


@functools.cache
def _rotation(width: int) -> Tensor:
    half = np.eye(width // 2, dtype=np.float32)
    zero = np.zeros_like(half)
    return constant(np.block([[zero, -half], [half, zero]]))


@contextlib.contextmanager
def _transposed_weights_as_product(model: PreTrainedModel) -> Iterator[None]:
    """GPT-2's ``Conv1D`` (a linear layer whose weight lies the other way round) as a product.

    Why: it flattens all but the last dimension, and the views would split the program.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Conv1D)]
    for layer in layers:
        layer.forward = functools.partial(_transposed_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _transposed_linear(layer: Any, values: Tensor) -> Tensor:  # noqa: ANN401  Conv1D
    result: Tensor = values.matmul(layer.weight) + layer.bias
    return result


@contextlib.contextmanager
def _relative_positions_of_slots(model: Any, current: Attending) -> Iterator[None]:  # noqa: ANN401  MPNetModel
    """MPNet: its bias by distance for the slots of a row, and its attention by ours.

    Why: it computes the bias over the tokens of its batch, which are packed here, and does not
    ask the library's table for its attention.
    """
    encoder = model.encoder
    bias_by_distance = encoder.compute_position_bias

    def slot_bias(*_: Any, **__: Any) -> Tensor:  # noqa: ANN401  whatever the model hands over
        length = current.packing.slots_BT.shape[1]
        bias: Tensor = bias_by_distance(torch.zeros(1, length, 1))
        return bias

    def attention(module: Any, hidden: Tensor, _mask: Any, bias: Tensor, **_: Any) -> Any:  # noqa: ANN401
        width = module.attention_head_size
        query, key, value = (
            part(hidden).view(1, hidden.shape[1], -1, width).transpose(1, 2)
            for part in (module.q, module.k, module.v)
        )
        mixed, _weights = packed_attention(
            module, query, key, value, None, scaling=1 / math.sqrt(width), slot_bias_1HTT=bias
        )
        return (module.o(mixed.reshape(1, hidden.shape[1], -1)),)

    encoder.compute_position_bias = slot_bias
    layers = [layer.attention.attn for layer in encoder.layer]
    for layer in layers:
        layer.forward = lambda *args, layer=layer, **kwargs: attention(layer, *args, **kwargs)
    try:
        yield
    finally:
        del encoder.compute_position_bias
        for layer in layers:
            del layer.forward
