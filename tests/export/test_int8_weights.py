"""Weights rounded to int8: how far, what is found of them in a program, and what is shipped."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import write_model
from export_cases import MODEL, golden_batch, step_inputs
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedModel

from carpool.bundle import Bundle
from carpool.bundle.manifest import FileEntry, PackedWeights
from carpool.bundle.weights import expanded
from carpool.errors import ExportError
from carpool.theta import write_theta
from carpool_device.runtime import DeviceProgram
from carpool_device.selftest import replay_golden_step, require_passed
from carpool_export.exporter import export_bundle
from carpool_export.model import EAGER_ATTENTION, load_model
from carpool_export.model.weights import pack_program, round_to_int8
from carpool_export.parity import random_theta, relative_error
from carpool_export.reference import Reference
from carpool_export.runner import LoadedProgram
from carpool_export.settings import ExportSettings
from carpool_export.source import open_source
from carpool_export.ways_out.merge import merge


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=90,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=40,
        )
    )


def gpt2() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=4, n_positions=40))


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and p.numel() >= 1024}


@pytest.mark.parametrize("model", [bert(), gpt2()], ids=["bert", "gpt2"])
def test_weights_move_by_half_a_step_of_their_output_channel(model: PreTrainedModel) -> None:
    """A step is a 127th of the channel's largest weight; GPT-2's channels are columns."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    rounded = matrices(model)
    round_to_int8(model)
    assert len(rounded) >= 5
    for name, parameter in model.named_parameters():
        if name not in rounded:
            assert torch.equal(parameter, before[name]), name
            continue
        transposed = isinstance(model, GPT2Model) and not name.startswith(("wte", "wpe"))
        old, new = (w.double().T if transposed else w.double() for w in (before[name], parameter))
        step = old.abs().amax(1, keepdim=True) / 127
        assert ((new - old).abs() <= step * (0.5 + 2**-8)).all(), name
        assert (new - old).abs().max() > 0.4 * step.min(), name  # it was rounded
        assert all(len(row.unique()) <= 255 for row in new), name


def test_rounding_twice_changes_nothing() -> None:
    """The packer takes the scales from the rounded weights again."""
    model = bert()
    round_to_int8(model)
    once = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    round_to_int8(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.named_parameters())


def packed_and_back(program: bytes, model: nn.Module) -> tuple[int, int, bytes]:
    """Number of segments, bytes to ship, and what they expand to."""
    assert isinstance(model, PreTrainedModel)
    pieces, segments = pack_program(program, model)
    packed = PackedWeights(
        file="x", program=FileEntry(bytes=len(program), sha256="0" * 64), segments=segments
    )
    shipped = b"".join(pieces)
    assert len(shipped) == packed.file_bytes
    return len(segments), len(shipped), b"".join(expanded(io.BytesIO(shipped), packed))


def test_matrices_are_found_upright_transposed_and_in_parts() -> None:
    """Among other bytes, and with rows of zeros in front."""
    model = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[:3] = 0
    round_to_int8(model)
    layer = model.encoder.layer[0]
    query, wide = layer.attention.self.query.weight, layer.intermediate.dense.weight
    table = model.embeddings.word_embeddings.weight
    parts = [
        table,
        query.T,
        wide[32:],  # the second half before the first
        torch.randn(7, 4),
        wide[:32],
        layer.output.dense.weight,
    ]
    program = b"".join(part.detach().contiguous().numpy().tobytes() for part in parts) + b"odd"
    count, size, back = packed_and_back(program, model)
    assert count == 5  # the table, the query, two halves of one, the last
    assert back == program
    values = sum(part.numel() for part in parts) - 28
    scales = 90 + 32 + 64 + 32
    assert size == values + 4 * scales + 28 * 4 + 3


def test_a_program_without_the_weights_is_shipped_as_it_is() -> None:
    """Nothing is taken for a matrix that is none."""
    model = bert()
    round_to_int8(model)
    program = np.random.default_rng(0).bytes(100_000)
    assert packed_and_back(program, model) == (0, len(program), program)


def test_other_weights_are_refused_by_name(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """Before any work."""
    settings = ExportSettings(weights="int4", max_length=14, document_length=16)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="--weights: expected float32 or int8, got 'int4'"):
        export_bundle(
            str(tiny_model), tiny_documents, tmp_path / "out", settings, announce=lambda _: None
        )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "phi3", "llama"])
def test_every_matrix_of_an_export_is_found(
    architecture: str, tmp_path: Path, tokenizer_json: str, tiny_documents: Path
) -> None:
    """Separate and fused projections, and weights that lie the other way round."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json)
    folder = write_model(architecture, tmp_path / architecture, tokenizer)
    pooling = "mean" if architecture == "bert" else "last"
    settings = ExportSettings(
        weights="int8", pooling=pooling, max_batch=3, max_length=14, document_length=16
    )  # type: ignore[arg-type]  # one of both
    bundle = export_bundle(
        str(folder), tiny_documents, tmp_path / "out", settings, announce=lambda _: None
    )
    packed = bundle.manifest.program.packed
    assert packed is not None
    found = sum(segment.rows * segment.columns for segment in packed.segments)
    model = load_model(folder, attention=EAGER_ATTENTION)
    used = [p for name, p in matrices(model).items() if not name.startswith("pooler.")]
    assert found == sum(parameter.numel() for parameter in used)
    program = DeviceProgram.load(bundle)
    require_passed(replay_golden_step(program), program=program)


@pytest.fixture(scope="module")
def int8_bundle(attack_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        MODEL,
        attack_set / "documents.jsonl",
        tmp_path_factory.mktemp("int8") / "bundle",
        ExportSettings(weights="int8"),
        announce=lambda _: None,
    )


@pytest.mark.slow
def test_minilm_ships_in_thirty_megabytes_and_is_eager_on_the_rounded_weights(
    int8_bundle: Bundle, tmp_path: Path
) -> None:
    """The issue's bar; the reference is rounded here in plain numpy; merge scores alike."""
    manifest = int8_bundle.manifest
    assert manifest.files["program.pte.int8"].bytes <= 30_000_000
    assert sum(entry.bytes for entry in manifest.files.values()) <= 30_000_000
    assert "rounded to int8" in manifest.licences[0].notice
    eager = load_model(open_source(MODEL).folder, attention=EAGER_ATTENTION)
    for parameter in matrices(eager).values():
        weights = parameter.detach().numpy()
        mantissa, exponent = np.frexp(np.abs(weights).max(axis=1, keepdims=True) / np.float32(127))
        step = np.ldexp(np.ceil(mantissa * 2.0**16) / 2**16, exponent)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.rint(weights / np.where(step, step, 1)) * step))
    reference = Reference(
        model=eager.double(),
        layout=manifest.layout,
        readout=open_source(MODEL).readout,
        logit_scale=manifest.logit_scale,
        corpus={name: torch.from_numpy(array) for name, array in int8_bundle.corpus().items()},
    )
    program = LoadedProgram(int8_bundle.program_path, manifest.program.methods)
    theta = random_theta(manifest.layout.num_values, seed=3)
    batch = golden_batch(int8_bundle)
    (scores,) = program.call("scores", step_inputs(reference, theta, batch))
    with torch.no_grad():
        assert relative_error(scores, reference.scores(theta, batch)) <= 5e-6
    write_theta(
        tmp_path / "theta.safetensors",
        theta.numpy(),
        layout=manifest.layout,
        bundle_id=int8_bundle.id,
        round_number=1,
    )
    merge(int8_bundle.path, tmp_path / "theta.safetensors", tmp_path / "merged", model=MODEL)
    library = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    _, texts = int8_bundle.golden()
    vectors = load_file(tmp_path / "merged" / "documents.safetensors")["vectors"]
    queries = library.encode(texts, convert_to_tensor=True)
    assert relative_error(library.similarity(queries, vectors), scores) <= 1e-5
