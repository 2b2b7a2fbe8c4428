from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_cases import Case, open_case
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", ".")
# Under pytest's log capture torch believes that its structured trace is wanted: many seconds.
logging.getLogger("torch.__trace").disabled = True

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="session")
def small(small_bundle: Path) -> Case:
    return open_case(small_bundle)


@pytest.fixture(scope="session")
def paper(paper_bundle: Path) -> Case:
    return open_case(paper_bundle)


@pytest.fixture(scope="session")
def _tiny_weights() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A WordPiece tokenizer of 12 words."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return str(tokenizer.to_str())


@pytest.fixture
def tiny_model(_tiny_weights: BertModel, tokenizer_json: str, tmp_path: Path) -> Path:
    """A sentence-transformers folder with a random one-layer BERT and a tokenizer of 12 words."""
    folder = tmp_path / "tiny"
    _tiny_weights.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    chain = (("Transformer", ""), ("Pooling", "1_Pooling"))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, path) in enumerate(chain)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def tiny_documents(tmp_path: Path) -> Path:
    """Nine documents over the tiny tokenizer's words."""
    path = tmp_path / "documents.jsonl"
    lines = [
        {"id": f"d{i}", "title": f"{WORDS[i]} {WORDS[6 + i % 3]}", "text": WORDS[9 + i % 2]}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "NOTICE").write_text("Written for a test.")
    return path


@pytest.fixture
def change_json() -> Callable[..., None]:
    """Sets keys of a JSON file."""

    def change(path: Path, **values: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change
