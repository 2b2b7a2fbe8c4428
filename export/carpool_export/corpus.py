# ruff: noqa: N803  shape suffixes: the legend stands in the docstring
"""The catalogue as the program sees it: an embedding per document, and their directions.

Shapes: C documents, D embedding dimension, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from carpool.packing import pack
from carpool_export.methods import MIN_LENGTH
from carpool_export.runner import LoadedProgram


def load_tokenizer(path: Path, *, max_length: int) -> Tokenizer:
    """A ``tokenizer.json`` that cuts to ``max_length`` tokens, special ones included."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def encode_rows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special ones included."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def embed_passages(
    program: LoadedProgram,
    tokenizer: Tokenizer,
    passages: Sequence[str],
    *,
    untrained: Mapping[str, Tensor],
    max_batch: int,
) -> Tensor:
    """The passages' embeddings by the program itself, untrained: float32 ``(C, D)``.

    Args:
        program: with the method ``embed``.
        tokenizer: cuts the passages.
        passages: in the order of the rows.
        untrained: theta of zeros, and the adapter's frozen inputs.
        max_batch: most rows in a call.
    """
    rows = encode_rows(tokenizer, passages)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    parts = []
    for start in range(0, len(rows), max_batch):
        chosen = [torch.tensor(rows[place]).numpy() for place in by_length[start:][:max_batch]]
        tokens = pack(chosen, min_length=MIN_LENGTH).named()
        query = {name: torch.from_numpy(array) for name, array in tokens.items()}
        parts.extend(program.call("embed", {**untrained, **query}))
    embeddings = torch.cat(parts)
    embeddings[torch.tensor(by_length)] = embeddings.clone()
    return embeddings


def principal_directions(rows_CD: Tensor, *, rank: int) -> Tensor:
    """The first ``rank`` right singular vectors of the rows: float32 ``(D, R)``.

    Guarantees: orthonormal columns; each column's entry of largest magnitude is positive, so
    the same rows give the same signs.
    """
    _, _, right = torch.linalg.svd(rows_CD.double(), full_matrices=False)
    basis = right[:rank].T
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = basis * largest.sign()
    return signed.float().contiguous()
