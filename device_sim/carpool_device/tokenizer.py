"""From a query to token ids, as the bundle's manifest says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from carpool.bundle import Bundle
from carpool.errors import DeviceError
from carpool.packing import PackedTokens, pack


class QueryTokenizer:
    """The bundle's ``tokenizer.json`` with carpool's own cutting.

    A ``tokenizer.json`` may bring truncation and padding of its own; both are switched off,
    because only the manifest's are the same on every device.

    Attributes:
        max_length: most tokens of a query, special ones included.
        min_length: fewest slots of a batch: the program's lower bound.
        prompt: put before every query.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int, min_length: int, prompt: str = ""
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.min_length = min_length
        self.prompt = prompt

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
        length = manifest.program.methods["gradients"].bounds["length"]
        if manifest.tokenizer.max_length > length.max:
            raise DeviceError(
                f"{bundle.path}: expected queries of at most {length.max} tokens, "
                f"which the program takes, got a tokenizer that cuts at "
                f"{manifest.tokenizer.max_length}. Export the bundle again."
            )
        return cls(
            tokenizer,
            max_length=manifest.tokenizer.max_length,
            min_length=length.min,
            prompt=manifest.tokenizer.query_prompt,
        )

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, max_length: int | None = None
    ) -> list[NDArray[np.int64]]:
        """Token ids of each text, after the prompt, special tokens included, not padded.

        Guarantees: at most ``max_length`` ids each; by default that and the prompt are the
        attributes'. A longer text loses its last ordinary tokens and keeps the special ones
        around it (as transformers' ``truncation=True`` does). Any string works: unpaired
        surrogates, which no UTF-8 can carry, count as U+FFFD.

        Returns:
            int64 arrays of shape ``(length,)``, in the order of ``texts``.

        Raises:
            DeviceError: a text gives no token at all (only where the tokenizer adds none).
        """
        most = self.max_length if max_length is None else max_length
        before = self.prompt if prompt is None else prompt
        encodings = self._tokenizer.encode_batch([_as_unicode(before + text) for text in texts])
        rows = []
        for place, encoding in enumerate(encodings):
            ids = np.array(encoding.ids, dtype=np.int64)
            if not ids.size:
                raise DeviceError(f"text {place + 1} of {len(texts)}: expected a token, got none.")
            if ids.size > most:
                special = np.array(encoding.special_tokens_mask, dtype=np.bool_)
                room = most - int(special.sum())
                ids = ids[special | (np.cumsum(~special) <= room)]
            rows.append(ids)
        return rows

    def pack(self, rows: Sequence[NDArray[np.int64]]) -> PackedTokens:
        """Rows of ids as the program takes them: ``carpool.packing.pack``."""
        return pack(rows, min_length=self.min_length)


def _as_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
