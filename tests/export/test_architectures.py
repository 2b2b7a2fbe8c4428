"""Every architecture through the one generic path, against the library's own model in float64."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from architectures import write_model
from torch import Tensor
from transformers import BertConfig, BertModel

from carpool.errors import ExportError
from carpool_export.exporter import export_bundle
from carpool_export.model import (
    EAGER_ATTENTION,
    PACKED_ATTENTION,
    Encoder,
    Packing,
    Pooling,
    Readout,
    build_encoder,
    load_model,
    loading,
)
from carpool_export.parity import random_batch, relative_error
from carpool_export.reference import Batch, read_out
from carpool_export.settings import ExportSettings
from carpool_export.trainables import Kinds

POOLINGS: dict[str, tuple[Pooling, ...]] = dict.fromkeys(
    architectures.ENCODERS, ("mean", "cls")
) | dict.fromkeys(architectures.DECODERS, ("mean", "last"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_json)
    return path


@pytest.fixture(params=sorted(architectures.ALL))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(architecture: str, tmp_path: Path, tiny_tokenizer: Path) -> Path:
    return write_model(architecture, tmp_path / architecture, tiny_tokenizer)


def open_encoder(folder: Path, readout: Readout) -> Encoder:
    packed, eager = (
        load_model(folder, attention=attention) for attention in (PACKED_ATTENTION, EAGER_ATTENTION)
    )
    return build_encoder(packed, eager, readout)


def packing(batch: Batch) -> Packing:
    query = batch.packed()
    return Packing(query["token_rows"], query["token_positions"], query["slot_tokens"])


def test_packed_rows_are_embedded_as_the_library_does(architecture: str, folder: Path) -> None:
    """Embeddings and their gradients by every token's embedding, rows of one to twelve tokens."""
    eager = load_model(folder, attention=EAGER_ATTENTION).double()
    batch = random_batch(
        batch=4, length=12, vocabulary=architectures.VOCABULARY, num_documents=2, seed=3
    )
    batch.attention_mask[1, 1:] = 0
    real = batch.attention_mask.bool()
    generator = torch.Generator().manual_seed(5)
    for pooling in POOLINGS[architecture]:
        encoder = open_encoder(folder, Readout(pooling=pooling))
        assert encoder.causal == (architecture in architectures.DECODERS)
        tokens = encoder.token_embeddings(batch.packed()["token_ids"]).detach().requires_grad_()
        found = encoder.embed(tokens, packing(batch))
        direction = torch.randn(found.shape, generator=generator)
        (gradient,) = torch.autograd.grad(found, tokens, direction)

        soft = eager.get_input_embeddings()(batch.input_ids[real]).detach().requires_grad_()
        rows = soft.split(real.sum(1).tolist())
        states = [eager(inputs_embeds=row.unsqueeze(0)).last_hidden_state[0] for row in rows]
        expected = torch.stack([read_out(row, encoder.readout) for row in states])
        (expected_gradient,) = torch.autograd.grad(expected, soft, direction.double())
        assert relative_error(found.detach(), expected.detach()) <= 1e-6
        assert relative_error(gradient, expected_gradient) <= 2e-6


@pytest.mark.slow
def test_exported_program_passes_the_gate(
    architecture: str, folder: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """All methods, dynamic, padded batches, clipped and not: at most 2e-6 off, or no bundle."""
    pooling = POOLINGS[architecture][len(architecture) % 2]
    settings = ExportSettings(
        kinds=Kinds(adapter="linear", head="core", document_bias=True),
        pooling=pooling,
        max_batch=4,
        max_length=20,
        document_length=24,
    )
    bundle = export_bundle(
        str(folder), tiny_documents, tmp_path / "bundle", settings, announce=lambda _: None
    )
    manifest = bundle.manifest
    assert manifest.model.architecture == architecture
    assert manifest.model.pooling == pooling
    assert 0 < manifest.parity.gradient_error <= 2e-6


class ShiftedBert(BertModel):
    """An architecture that nobody listed: its tokens see their neighbours without attention."""

    def forward(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
        """The last states, each with the one before it added."""
        result = super().forward(*arguments, **options)  # type: ignore[arg-type]
        states: Tensor = result.last_hidden_state  # type: ignore[union-attr]
        result.last_hidden_state = states + states.roll(1, dims=1)  # type: ignore[union-attr]
        return result


def bert_pair(kind: type[BertModel]) -> tuple[BertModel, BertModel]:
    packed, eager = (
        kind(BertConfig(**architectures.ENCODERS["bert"], attn_implementation=attention)).eval()
        for attention in (PACKED_ATTENTION, EAGER_ATTENTION)
    )
    packed.load_state_dict(eager.state_dict())
    return packed, eager


def test_tokens_that_meet_outside_attention_are_refused() -> None:
    """Packed rows would run into each other: found by trying, before anything is traced."""
    packed, eager = bert_pair(ShiftedBert)
    with pytest.raises(
        ExportError,
        match=r"^bert: its tokens depend on each other outside attention, or on the size of the "
        r"batch: run on packed rows it is off by \de[+-]\d\d of the largest value; expected at "
        r"most 1e-04\. This architecture is not supported\.$",
    ):
        build_encoder(packed, eager, Readout())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "BertSelfAttention hands 'softcap' to attention, which is not "),
        ({"s_aux": torch.ones(4)}, "BertSelfAttention hands 's_aux' to attention, which is not "),
    ],
)
def test_unknown_attention_argument_is_refused_by_name(
    options: dict[str, object], message: str
) -> None:
    """A soft cap or sinks would be left out in silence."""
    packed, eager = bert_pair(BertModel)
    for layer in packed.encoder.layer:
        attention = layer.attention.self
        original = attention.forward
        attention.forward = lambda *given, original=original, **named: original(
            *given, **named, **options
        )
    with pytest.raises(ExportError, match=f"^{message}"):
        loading.build_encoder(packed, eager, Readout())


def test_mask_of_its_own_is_refused() -> None:
    """ALiBi and the like come as an additive mask over the batch's tokens."""
    packed, eager = bert_pair(BertModel)
    attention = packed.encoder.layer[1].attention.self
    original = attention.forward
    attention.forward = lambda hidden, **named: original(
        hidden,
        **named | {"attention_mask": torch.zeros(1, 4, hidden.shape[1], hidden.shape[1])},
    )
    with pytest.raises(
        ExportError,
        match=r"^BertSelfAttention hands a mask of its own to attention \(shape \(1, 4, 8, 8\)\); "
        r"supported: causal, sliding window and padding alone\.$",
    ):
        build_encoder(packed, eager, Readout())
