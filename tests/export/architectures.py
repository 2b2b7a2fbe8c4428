"""A small random model of each architecture: two blocks, and what makes it differ from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

VOCABULARY = 90
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
}
_SHARED_KEYS = _SIZES | {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": _SIZES,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 48,
    },
    "roberta": _SIZES | {"pad_token_id": 1},
    "xlm-roberta": _SIZES | {"pad_token_id": 1},
    "electra": _SIZES | {"embedding_size": 24},
    "albert": _SIZES | {"embedding_size": 24},
    "mpnet": _SIZES,
    "modernbert": _SIZES
    | {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
    "nomic_bert": _SIZES,
}

DECODERS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _SIZES,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 48,
        "word_embed_proj_dim": 24,
    },
    "llama": _SHARED_KEYS,
    "qwen2": _SHARED_KEYS
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": _SHARED_KEYS | {"head_dim": 16},
    "gemma3_text": _SHARED_KEYS
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": _SHARED_KEYS,
}

ALL = ENCODERS | DECODERS


def write_model(name: str, folder: Path, tokenizer: Path) -> Path:
    """Saves the architecture's model with random weights, and the tokenizer, as a plain folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ALL[name])
    model = AutoModel.from_config(config).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero would hide faults
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# Tiny {name}\n")
    return folder
