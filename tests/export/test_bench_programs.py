"""The benchmark of the training step, on a tiny random model: nothing here looks at the times."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import write_model

from carpool_export.exporter import export_bundle
from carpool_export.settings import ExportSettings
from carpool_export.trainables import AdapterKind, HeadKind, Kinds

REPOSITORY = Path(__file__).parents[2]
BEGIN = "<!-- results: begin -->"

Export = Callable[[AdapterKind, HeadKind, bool], Path]


def bench(*arguments: str, fails: bool = False) -> str:
    """What the real command printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.programs", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture
def export(tiny_model: Path, tiny_documents: Path, tmp_path: Path) -> Export:
    """Makes a bundle of the tiny model with this adapter, head and document bias."""

    def made(adapter: AdapterKind, head: HeadKind, bias: bool) -> Path:  # noqa: FBT001  a table's column
        kinds = Kinds(adapter=adapter, head=head, document_bias=bias, adapter_rank=3, head_rank=5)
        settings = ExportSettings(kinds=kinds, max_length=16, document_length=16, max_batch=4)
        out = tmp_path / f"{adapter}-{head}"
        export_bundle(str(tiny_model), tiny_documents, out, settings, announce=lambda _: None)
        return out

    return made


def measured(bundle: Path, *arguments: str, model: Path) -> tuple[Path, dict[str, Any]]:
    """The stored results of one turn of each side, and where they are."""
    path = bundle.with_suffix(".json")
    fixed = ("--model", str(model), "--repeats", "1", "--threads", "1", "--json", str(path))
    bench("run", str(bundle), *fixed, *arguments)
    return path, json.loads(path.read_text())


OURS_AND_TORCHS = {
    "carpool": True,
    "carpool, not clipped": False,
    "eager": False,
    "Opacus, clipped": True,
}
"""Side, and whether it clips."""

STOCK = {"stock ExecuTorch, portable": False, "stock ExecuTorch, XNNPACK": False}


def check_agreement(bundle: Path, expected: dict[str, bool], *, model: Path) -> None:
    """All but torch.compile, which takes a compiler and a minute."""
    peers = ("--peers", "carpool,eager,opacus,stock")
    _, results = measured(bundle, "--shapes", "3x7", *peers, model=model)
    (shape,) = results["shapes"]
    assert {timing["peer"] for timing in shape["timings"]} == OURS_AND_TORCHS.keys() | STOCK.keys()
    ran = [timing for timing in shape["timings"] if timing["not_run"] is None]
    assert expected.items() <= {timing["peer"]: timing["clipped"] for timing in ran}.items(), shape
    for timing in ran:
        assert timing["gradient_difference"] <= 1e-5, timing
        assert timing["loss_difference"] <= 1e-5, timing
        assert timing["seconds"], timing


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [("scale-bias", "core", True), ("linear", "rows", False), ("low-rank", "map", False)],
    ids=lambda kinds: kinds[0],
)
def test_every_side_takes_the_same_step(
    kinds: tuple[AdapterKind, HeadKind, bool], export: Export, tiny_model: Path
) -> None:
    """Loss and gradient of each against eager PyTorch in float64, to 1e-5; all were timed."""
    check_agreement(export(*kinds), OURS_AND_TORCHS | STOCK, model=tiny_model)


@pytest.mark.slow
def test_sides_take_a_decoders_step(
    tiny_documents: Path, tokenizer_json: str, tmp_path: Path
) -> None:
    """The same for a causal model whose last token is the text's embedding.

    ExecuTorch's own export stops at the derivative of its attention (1.5.1); that is reported.
    """
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json)
    model = write_model("llama", tmp_path / "llama", tokenizer)
    kinds = Kinds(adapter="linear", head="core", document_bias=True)
    settings = ExportSettings(
        kinds=kinds, pooling="last", max_length=20, document_length=24, max_batch=4
    )
    out = tmp_path / "bundle"
    export_bundle(str(model), tiny_documents, out, settings, announce=lambda _: None)
    check_agreement(out, OURS_AND_TORCHS, model=model)


@pytest.mark.slow
def test_page_holds_what_was_stored_and_keeps_the_rest(
    export: Export, tiny_model: Path, tmp_path: Path
) -> None:
    """From the command to JSON to the page: its cells are the stored medians, its text stays."""
    head = ("--head-only", str(export("none", "core", True)))
    arguments = ("--shapes", "3x7,3x16,2x16", "--peers", "carpool,eager", *head)
    stored, results = measured(export("scale-bias", "core", True), *arguments, model=tiny_model)
    page = (REPOSITORY / "docs" / "programs.md").read_text()
    before, by_hand = page.split(BEGIN)[0], "\nWritten by hand.\n"
    (tmp_path / "programs.md").write_text(page + by_hand)
    for _ in range(2):  # a second time replaces what the first wrote
        bench("page", str(stored), "--docs", str(tmp_path))
    made = (tmp_path / "programs.md").read_text()
    assert made.startswith(before + BEGIN)
    assert made.endswith(by_hand)
    (row,) = re.findall(
        r"^\| carpool, head only \| (.*) \|$", made.split(BEGIN)[1], flags=re.MULTILINE
    )
    for cell, shape in zip(row.split(" | "), results["shapes"], strict=True):
        (timing,) = [t for t in shape["timings"] if t["peer"] == "carpool, head only"]
        assert timing["clipped"]
        assert timing["gradient_difference"] <= 1e-5
        assert float(cell.split()[0]) == pytest.approx(1000 * timing["median_seconds"], abs=0.051)
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", made)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_wrong_arguments_are_named_before_anything_is_measured(
    export: Export, tiny_model: Path
) -> None:
    """Each message says what was expected and what it got."""
    bundle = str(export("scale-bias", "core", True))
    for name, value, message in (
        ("--shapes", "8by32", "--shapes: expected BATCHxLENGTH such as 8x32, got '8by32'."),
        ("--shapes", "3x40", "3x40: expected length of 2 to 16"),
        ("--peers", "eagre", "--peers: unknown 'eagre'; did you mean 'eager'?"),
        ("--head-only", bundle, "expected a bundle with adapter none, got scale-bias."),
    ):
        given = {"--model": str(tiny_model), "--shapes": "3x7"} | {name: value}
        options = [text for pair in given.items() for text in pair]
        assert message in bench("run", bundle, *options, fails=True)
