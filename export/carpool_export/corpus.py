# ruff: noqa: N803  shape suffixes: the legend stands in the docstring
"""The catalogue as the program sees it: an embedding per document, and their directions.

Shapes: N documents, D embedding dimension, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

_BATCH = 16


def load_tokenizer(path: Path, *, max_length: int) -> Tokenizer:
    """A ``tokenizer.json`` that cuts to ``max_length`` tokens, special ones included."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def pad(rows: Sequence[Sequence[int]], *, pad_id: int, min_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 ``(rows, longest row or min_length)``, padding at the end."""
    length = max(min_length, *(len(row) for row in rows))
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return ids, mask


def embed_passages(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    passages: Sequence[str],
    *,
    pad_id: int,
) -> Tensor:
    """Mean-pooled embeddings of length 1 by the untrained model: float32 ``(N, D)``.

    Args:
        model: with one of the library's own attentions.
        tokenizer: cuts the passages.
        passages: in the order of the rows.
        pad_id: the model's padding token.
    """
    rows = [tokenizer.encode(passage).ids for passage in passages]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
    embeddings = torch.zeros(len(rows), int(model.config.hidden_size))
    for start in range(0, len(rows), _BATCH):
        places = by_length[start : start + _BATCH]
        ids, mask = pad([rows[place] for place in places], pad_id=pad_id, min_length=1)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * real).sum(1) / real.sum(1)
        embeddings[torch.tensor(places)] = functional.normalize(mean, dim=-1)
    return embeddings


def principal_directions(rows_ND: Tensor, *, rank: int) -> Tensor:
    """The first ``rank`` right singular vectors of the rows: float32 ``(D, R)``.

    Guarantees: orthonormal columns; each column's entry of largest magnitude is positive, so
    the same rows give the same signs.
    """
    _, _, right = torch.linalg.svd(rows_ND.double(), full_matrices=False)
    basis = right[:rank].T
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = basis * largest.sign()
    return signed.float().contiguous()
