from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import typer
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import split_clients, write_dataset
from carpool.errors import CarpoolError, ConfigError, DeviceError, ThetaError
from carpool.theta import Layout, Segment, write_theta
from carpool_device.commands import register
from carpool_device.runtime import DeviceProgram
from carpool_device.search import search
from carpool_device.selftest import Check, replay_golden_step, require_passed

Run = Callable[..., str]
MakeBundle = Callable[..., Bundle]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line; a CarpoolError comes through as itself."""
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    register(app)

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if isinstance(result.exception, CarpoolError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten clients with queries about the tiny documents."""
    examples = [
        Example(client=f"c{i}", query=f"{word} {tiny.WORDS[-i]}", document=document.id)
        for i in range(10)
        for document in tiny.DOCUMENTS[: 1 + i % 5]
        for word in [document.title.split()[0]]
    ]
    split = split_clients((e.client for e in examples), seed=1, held_out=0.3)
    write_dataset(tmp_path / "data", documents=tiny.DOCUMENTS, examples=examples, split=split)
    return tmp_path / "data"


@pytest.fixture
def trained(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A theta whose document bias puts "stone" first for every query."""
    theta = np.zeros(tiny.LAYOUT.num_values, np.float32)
    theta[tiny.WIDTH + 3] = 100
    path = tmp_path / "theta.safetensors"
    write_theta(path, theta, layout=tiny.LAYOUT, bundle_id=tiny_bundle.id, round_number=1)
    return path


def rewrite_golden(bundle: Bundle, **changes: NDArray[Any] | None) -> DeviceProgram:
    """The bundle with other golden arrays, past the check of its hashes."""
    path = bundle.path / "golden.safetensors"
    arrays = load_file(path) | changes
    texts = json.dumps(tiny.golden_step()[1])
    save_file({k: v for k, v in arrays.items() if v is not None}, path, metadata={"texts": texts})
    return DeviceProgram(bundle)


def test_selftest_passes_on_the_machine_that_made_the_bundle(run: Run, tiny_bundle: Bundle) -> None:
    """Prints every result with its error and tolerance."""
    output = run("selftest", tiny_bundle.path)
    assert f"Golden step of bundle {tiny_bundle.id[:12]}" in output
    for name in ("token ids", "loss", "gradient", "scores", "embed"):
        assert name in output
    assert "OUTSIDE" not in output


@pytest.mark.parametrize(
    "name", ["expected_loss", "expected_gradient", "expected_scores", "expected_embed"]
)
def test_selftest_notices_each_result_that_is_off(make_tiny: MakeBundle, name: str) -> None:
    """Twice the tolerance off in a single value, and only that result is named."""
    bundle = make_tiny()
    values = tiny.golden_step()[0][name].copy()
    values.flat[values.size // 2] += 2e-5 * np.abs(values).max()
    program = rewrite_golden(bundle, **{name: values})
    checks = replay_golden_step(program)
    short = name.removeprefix("expected_")
    assert [c.name for c in checks if not c.passed] == [short]
    assert next(c.error for c in checks if not c.passed) == pytest.approx(2e-5, rel=0.2)
    with pytest.raises(DeviceError) as caught:
        require_passed(checks, program=program)
    assert str(caught.value).endswith(
        f"outside its tolerance: {short} (error 2e-05, at most 1e-05). "
        "Do not train or search with this runtime."
    )


def test_a_result_that_is_not_a_number_does_not_pass() -> None:
    """NaN compares false with everything, so the comparison must be the right way round."""
    assert not Check(name="loss", error=float("nan"), tolerance=1.0).passed


@pytest.mark.parametrize("name", ["token_ids", "token_rows", "token_positions", "slot_tokens"])
def test_selftest_notices_a_tokenizer_that_differs(make_tiny: MakeBundle, name: str) -> None:
    """The golden ids and their packing are compared with those of this device."""
    values = tiny.golden_step()[0][name].copy()
    values.flat[1] += 1
    program = rewrite_golden(make_tiny(), **{name: values})
    with pytest.raises(DeviceError, match=f"expected the golden step's {name} .* tokenizer diff"):
        replay_golden_step(program)


@pytest.mark.parametrize("name", ["labels", "documents", "expected_embed"])
def test_selftest_names_an_array_that_is_missing(make_tiny: MakeBundle, name: str) -> None:
    """A golden step of another schema."""
    program = rewrite_golden(make_tiny(), **{name: None})
    with pytest.raises(DeviceError, match=rf"golden\.safetensors: expected an array '{name}'"):
        replay_golden_step(program)


def test_selftest_replays_the_steps_own_frozen_inputs(make_tiny: MakeBundle) -> None:
    """Other documents in the step's file give other scores and another loss, not other ids."""
    documents = tiny.golden_step()[0]["documents"][::-1].copy()
    checks = replay_golden_step(rewrite_golden(make_tiny(), documents=documents))
    assert {c.name for c in checks if not c.passed} == {"loss", "gradient", "scores"}


def test_search_shows_documents_before_and_after_training(
    run: Run, tiny_bundle: Bundle, trained: Path
) -> None:
    """Side by side; training moved "stone" to the top."""
    lines = run(
        "search", tiny_bundle.path, "blue bird", "--theta", trained, "--top", 3
    ).splitlines()
    assert "before training" in "".join(lines)
    rows = [line for line in lines if line.startswith("│ ")]
    assert len(rows) == 3
    before, after = rows[0].split("│")[3], rows[0].split("│")[5]
    assert "blue bird (d-blue)" in before
    assert "stone (d-stone)" in after


@pytest.mark.parametrize("query", ["", "naïve 雪 [bold]", "dog " * 2500])
def test_search_takes_any_text(run: Run, tiny_bundle: Bundle, query: str) -> None:
    """Empty, non-ASCII with markup, 10,000 characters: five documents come back."""
    output = run("search", tiny_bundle.path, query)
    assert sum(line.startswith("│ ") for line in output.splitlines()) == 5
    assert "after training" not in output


def test_search_lists_the_highest_scores_first(tiny_program: DeviceProgram) -> None:
    """Against a plain sort of the program's scores."""
    rows = tiny_program.tokenizer.encode(["blue bird"])
    theta = tiny_program.bundle.initial_theta()
    scores = tiny_program.scores(theta, tiny_program.tokenizer.pack(rows))[0]
    hits = search(tiny_program, theta, "blue bird", top=9)
    assert [h.score for h in hits] == sorted(scores.tolist(), reverse=True)
    assert hits[0].document.id == "d-blue"


def test_a_theta_of_another_layout_is_refused_with_file_expected_and_found(
    run: Run, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Before the runtime is even loaded."""
    other = Layout(segments=(Segment(name="x", group="head", shape=(13,), scale=1.0),))
    path = tmp_path / "other.safetensors"
    write_theta(
        path, np.zeros(13, np.float32), layout=other, bundle_id=tiny_bundle.id, round_number=1
    )
    with pytest.raises(ThetaError) as caught:
        run("search", tiny_bundle.path, "dog", "--theta", path)
    assert str(caught.value) == (
        f"{path}: expected a theta of layout {tiny.LAYOUT.id}, got layout {other.id}. "
        "Use the theta that was trained for this bundle."
    )


def test_a_theta_of_another_bundle_is_refused_with_file_expected_and_found(
    run: Run, tiny_bundle: Bundle, dataset: Path, tmp_path: Path
) -> None:
    """Same layout, other documents or model: its values mean something else."""
    path = tmp_path / "other.safetensors"
    theta = np.zeros(13, np.float32)
    write_theta(path, theta, layout=tiny.LAYOUT, bundle_id="f" * 64, round_number=1)
    with pytest.raises(ThetaError) as caught:
        run("evaluate", tiny_bundle.path, dataset, "--theta", f"mine={path}")
    assert str(caught.value) == (
        f"{path}: expected a theta of bundle {tiny_bundle.id}, got bundle {'f' * 64}. "
        "Use the theta that was trained for this bundle."
    )


def test_evaluate_compares_baselines_and_thetas(
    run: Run, tiny_bundle: Bundle, dataset: Path, trained: Path, tmp_path: Path
) -> None:
    """The table, and the same numbers in JSON; ranks recomputed from search here."""
    out = tmp_path / "out"
    table = run("evaluate", tiny_bundle.path, dataset, "--theta", f"stone={trained}", "--out", out)
    report = json.loads((out / "evaluation.json").read_text())
    assert report["split"] == "validation"
    assert report["clients"] == 3
    assert list(report["systems"]) == ["BM25", "zero-shot", "stone"]
    assert set(report["against_zero_shot"]) == {"BM25", "stone"}
    split = json.loads((dataset / "split.json").read_text())["validation"]
    examples = [
        Example.model_validate_json(line)
        for line in (dataset / "examples.jsonl").read_text().splitlines()
    ]
    program = DeviceProgram.load(tiny_bundle)
    theta = tiny_bundle.initial_theta()
    right = [
        search(program, theta, e.query, top=1)[0].document.id == e.document
        for e in examples
        if e.client in split
    ]
    value, low, high = report["systems"]["zero-shot"]["acc@1"]
    assert value == pytest.approx(np.mean(right))
    assert low <= value <= high
    assert f"{value:.3f}" in table
    assert f"[{low:.3f}, {high:.3f}]" in table
    of_stone = np.mean([e.document == "d-stone" for e in examples if e.client in split])
    assert report["systems"]["stone"]["acc@1"][0] == pytest.approx(of_stone)
    assert report["against_zero_shot"]["stone"]["acc@1"][0] == pytest.approx(of_stone - value)


def test_the_test_clients_need_a_flag_and_come_with_a_warning(
    run: Run, tiny_bundle: Bundle, dataset: Path
) -> None:
    """Nobody looks at them by mistake."""
    with pytest.raises(ConfigError, match=r"^the test clients are to stay untouched until the fin"):
        run("evaluate", tiny_bundle.path, dataset, "--split", "test")
    output = run("evaluate", tiny_bundle.path, dataset, "--split", "test", "--final-claims")
    assert "3 test clients" in output


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["x"], "--theta: expected NAME=FILE, got 'x'."),
        (["=x"], "--theta: expected NAME=FILE, got '=x'."),
        (["BM25=x"], "--theta: expected distinct names, got 'BM25' again."),
        (["a=x", "a=y"], "--theta: expected distinct names, got 'a' again."),
    ],
)
def test_a_theta_option_that_cannot_be_read_is_refused(
    run: Run, tiny_bundle: Bundle, dataset: Path, pairs: list[str], message: str
) -> None:
    """Whole messages."""
    options = [part for pair in pairs for part in ("--theta", pair)]
    with pytest.raises(ConfigError) as caught:
        run("evaluate", tiny_bundle.path, dataset, *options)
    assert str(caught.value) == message


def test_documents_that_the_bundle_lacks_are_named(
    run: Run, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """A data set made for another catalogue."""
    others = [d.model_copy(update={"id": f"x-{d.id}"}) for d in tiny.DOCUMENTS]
    examples = [Example(client=f"c{i}", query="red", document="x-d-red") for i in range(10)]
    split = split_clients((e.client for e in examples), seed=1)
    write_dataset(tmp_path / "data", documents=others, examples=examples, split=split)
    with pytest.raises(DeviceError, match=r"^client c\d: unknown document id 'x-d-red'; expected"):
        run("evaluate", tiny_bundle.path, tmp_path / "data")


def test_a_changed_byte_is_refused_before_anything_runs(run: Run, make_tiny: MakeBundle) -> None:
    """Every command opens the bundle through its checks."""
    bundle = make_tiny()
    data = bytearray(bundle.program_path.read_bytes())
    data[100] ^= 1
    bundle.program_path.write_bytes(data)
    for arguments in (["selftest", bundle.path], ["search", bundle.path, "red"]):
        with pytest.raises(CarpoolError, match=r"program\.pte: expected SHA-256"):
            run(*arguments)
    assert isinstance(bundle, Bundle)
