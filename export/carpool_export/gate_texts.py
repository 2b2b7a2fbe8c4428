"""Batches of real text for the gate, cut from the catalogue's own passages.

Why not random tokens: through thirty blocks they drive activations where no text does, and
float32's own rounding there (eager PyTorch's up to 2.4e-6 of the largest gradient on
SmolLM2-135M, a third of that on text) hides what the gate looks for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from carpool_export.corpus import encode_rows, load_tokenizer
from carpool_export.reference import Batch, padded_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateTexts:
    """What rows are cut from.

    Attributes:
        tokenizer_path: a ``tokenizer.json``.
        prompt: put before every row.
        passages: at least one; a row starts with one of them and goes on with the next.
    """

    tokenizer_path: Path
    prompt: str
    passages: Sequence[str]

    def batch(
        self, *, batch: int, length: int, num_documents: int, seed: int, shortest: int = 2
    ) -> Batch:
        """Rows of different lengths; where there are several, one of weight 0.

        The first row is the longest; the others have ``shortest`` to ``length`` tokens. Labels
        are random; weights are positive and add up to 1.

        Raises:
            ValueError: the passages together are shorter than ``length`` tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, length + 1, (batch,), generator=generator)
        lengths[0] = length
        weights = 0.5 + torch.rand(batch, generator=generator)
        if batch > 1:
            weights[-1] = 0.0
        first = torch.randint(len(self.passages), (batch,), generator=generator)
        return padded_batch(
            [
                self._row(start, size)
                for start, size in zip(first.tolist(), lengths.tolist(), strict=True)
            ],
            labels=torch.randint(num_documents, (batch,), generator=generator).tolist(),
            weights=(weights / weights.sum()).tolist(),
        )

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path, max_length=1)

    def _row(self, start: int, length: int) -> list[int]:
        tokenizer = self._tokenizer
        tokenizer.enable_truncation(length)
        text = self.prompt
        for count in range(length):  # a passage has a token at least, or the next one has
            text += " " + self.passages[(start + count) % len(self.passages)]
            (row,) = encode_rows(tokenizer, [text])
            if len(row) == length:
                return row
        raise ValueError(f"expected passages of {length} tokens together, got {len(row)}")
