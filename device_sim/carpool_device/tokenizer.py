"""From a query to token ids, as the bundle's manifest says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from carpool.bundle import Bundle
from carpool.errors import DeviceError


class QueryTokenizer:
    """The bundle's ``tokenizer.json`` with carpool's own cutting and padding.

    A ``tokenizer.json`` may bring truncation and padding of its own; both are switched off,
    because only the manifest's are the same on every device.

    Attributes:
        max_length: most tokens of a query, special ones included.
        min_length: a batch is padded to at least this many tokens: the program's lower bound.
        pad_id: fills the shorter rows, with attention 0.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int, min_length: int, pad_id: int
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.min_length = min_length
        self.pad_id = pad_id

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> QueryTokenizer:
        """Reads the bundle's ``tokenizer.json``.

        Raises:
            DeviceError: the file is no tokenizer, its kind is not the manifest's, or the
                manifest's longest query does not fit the program.
        """
        path, manifest = bundle.tokenizer_path, bundle.manifest
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise DeviceError(f"{path}: expected a tokenizer.json, got: {error}") from error
        kind = type(tokenizer.model).__name__
        if kind != manifest.tokenizer.kind:
            raise DeviceError(f"{path}: expected kind {manifest.tokenizer.kind}, got {kind}.")
        if manifest.tokenizer.max_length > manifest.program.length.max:
            raise DeviceError(
                f"{bundle.path}: expected queries of at most {manifest.program.length.max} tokens, "
                f"which the program takes, got a tokenizer that cuts at "
                f"{manifest.tokenizer.max_length}. Export the bundle again."
            )
        return cls(
            tokenizer,
            max_length=manifest.tokenizer.max_length,
            min_length=manifest.program.length.min,
            pad_id=manifest.tokenizer.pad_id,
        )

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, special tokens included, not padded.

        Guarantees: at most ``max_length`` ids each. A longer text loses its last ordinary
        tokens and keeps the special ones around it (as transformers' ``truncation=True``
        does). Any string works: unpaired surrogates, which no UTF-8 can carry, count as
        U+FFFD.

        Returns:
            int64 arrays of shape ``(length,)``, in the order of ``texts``.

        Raises:
            DeviceError: a text gives no token at all (only where the tokenizer adds none).
        """
        encodings = self._tokenizer.encode_batch([_as_unicode(text) for text in texts])
        rows = []
        for place, encoding in enumerate(encodings):
            ids = np.array(encoding.ids, dtype=np.int64)
            if not ids.size:
                raise DeviceError(f"text {place + 1} of {len(texts)}: expected a token, got none.")
            if ids.size > self.max_length:
                special = np.array(encoding.special_tokens_mask, dtype=np.bool_)
                room = self.max_length - int(special.sum())
                ids = ids[special | (np.cumsum(~special) <= room)]
            rows.append(ids)
        return rows

    def pad(self, rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of ids as one rectangle, as long as its longest row and at least ``min_length``.

        Returns:
            ``input_ids`` and ``attention_mask``: int64, shape ``(len(rows), length)``; the
            mask is 1 on a row's own tokens and 0 on padding.
        """
        length = max([self.min_length, *(row.size for row in rows)])
        input_ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : row.size] = row
            attention_mask[i, : row.size] = 1
        return input_ids, attention_mask


def _as_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
