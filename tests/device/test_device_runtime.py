from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray

from carpool.bundle import Bundle
from carpool.bundle.manifest import RuntimeRange
from carpool.errors import DeviceError, ThetaError
from carpool_device.batches import Batch, make_batch
from carpool_device.runtime import DeviceProgram, check_runtime_version

TEXTS = ["red cat", "blue bird eats", "stone"]


def theta(seed: int = 0) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(size=tiny.LAYOUT.num_values)
    return values.astype(np.float32)


def batch_of(
    program: DeviceProgram, texts: Sequence[str] = TEXTS, labels: Sequence[int] = (0, 2, 3)
) -> Batch:
    return make_batch(program.tokenizer, program.tokenizer.encode(texts), list(labels))


def manifest_with(**changes: object) -> dict[str, Any]:
    program = tiny.manifest_fields()["program"]
    return {"program": program | changes}


@pytest.mark.parametrize("clip", [1e30, 1.0])
def test_gradients_equal_eager_pytorch(tiny_program: DeviceProgram, clip: float) -> None:
    """Inputs reach the program in the right order; the reference is autograd, by example."""
    batch = batch_of(tiny_program)
    loss, gradient = tiny_program.gradients(theta(), batch, l2_clip_norm=clip)
    model = tiny.TinyModel()
    scores = tiny.Scores(model)
    expected, expected_loss = torch.zeros(tiny.LAYOUT.num_values), 0.0
    for i, label in enumerate(batch.labels):
        leaf = torch.tensor(theta(), requires_grad=True)
        row = (torch.from_numpy(batch.input_ids[i : i + 1]),)
        row += (torch.from_numpy(batch.attention_mask[i : i + 1]),)
        logits = tiny.LOGIT_SCALE * scores(leaf, model.documents, *row)
        one = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        (each,) = torch.autograd.grad(one, leaf)
        expected += each * min(1.0, clip / each.norm().item()) / len(batch.labels)
        expected_loss += one.item() / len(batch.labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.dtype == np.float32
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * expected.abs().max())


def test_scores_equal_eager_pytorch(tiny_program: DeviceProgram) -> None:
    """One row of scores per query, in the catalogue's order."""
    ids, mask = tiny_program.tokenizer.pad(tiny_program.tokenizer.encode(TEXTS))
    model = tiny.TinyModel()
    inputs = (torch.from_numpy(theta()), model.documents, torch.from_numpy(ids))
    expected = tiny.Scores(model)(*inputs, torch.from_numpy(mask))
    found = tiny_program.scores(theta(), ids, mask)
    assert found.shape == (3, len(tiny.DOCUMENTS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_results_survive_the_next_call(tiny_program: DeviceProgram) -> None:
    """What was returned is the caller's own: another call does not write into it."""
    first = tiny_program.gradients(theta(0), batch_of(tiny_program), l2_clip_norm=1e30)[1]
    kept = first.copy()
    other = tiny_program.gradients(theta(1), batch_of(tiny_program), l2_clip_norm=1e30)[1]
    assert not np.array_equal(other, kept)
    np.testing.assert_array_equal(first, kept)


class LendingMethod:
    """A runtime that lends its own buffer, as other versions of ExecuTorch's do."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.buffers = [torch.zeros(shape) for shape in shapes]
        self.calls = 0

    def execute(self, _inputs: object) -> list[torch.Tensor]:
        """Writes the number of the call into the buffers and lends them."""
        self.calls += 1
        for buffer in self.buffers:
            buffer.fill_(self.calls)
        return self.buffers


def test_outputs_are_copied_even_from_a_runtime_that_lends_its_buffers(
    make_tiny: Callable[..., Bundle],
) -> None:
    """The promise must not hang on what one version of the runtime does."""
    program = DeviceProgram(make_tiny())
    program._methods["gradients"] = LendingMethod([(), (tiny.LAYOUT.num_values,)])
    batch = batch_of(program)
    loss, first = program.gradients(theta(), batch, l2_clip_norm=1.0)
    program.gradients(theta(), batch, l2_clip_norm=1.0)
    assert loss == 1
    assert np.all(first == 1)


def test_one_loaded_program_for_many_devices(
    tiny_bundle: Bundle, tiny_program: DeviceProgram
) -> None:
    """A bundle opened again is the same bundle: its program is loaded once in a process."""
    again = Bundle.open(tiny_bundle.path)
    assert again is not tiny_bundle
    assert DeviceProgram.load(again) is tiny_program


def test_another_bundle_is_another_program(
    tiny_program: DeviceProgram, make_tiny: Callable[..., Bundle]
) -> None:
    """The cache goes by the bundle's id."""
    assert DeviceProgram.load(make_tiny(preset="other")) is not tiny_program


def test_methods_are_loaded_when_first_used(make_tiny: Callable[..., Bundle]) -> None:
    """A device that only searches does not pay for gradients."""
    program = DeviceProgram(make_tiny())
    assert not program._methods
    program.scores(theta(), *program.tokenizer.pad(program.tokenizer.encode(["red"])))
    assert set(program._methods) == {"scores"}


def test_many_threads_get_their_own_results(tiny_program: DeviceProgram) -> None:
    """Calls from eight threads, each with its own theta, give what each would get alone."""
    batch = batch_of(tiny_program)
    expected = [tiny_program.gradients(theta(i), batch, l2_clip_norm=1e30)[1] for i in range(8)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            found = tiny_program.gradients(theta(i), batch, l2_clip_norm=1e30)[1]
            if not np.array_equal(found, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class SlowMethod(LendingMethod):
    """Lends buffers that say which call filled them, and lets other threads run meanwhile."""

    def execute(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Writes theta's first value into the buffers, waits, and lends them."""
        for buffer in self.buffers:
            buffer.fill_(float(inputs[0][0]))
        time.sleep(0.002)
        return self.buffers


def test_one_call_ends_before_the_next_begins(make_tiny: Callable[..., Bundle]) -> None:
    """The lock is held until the outputs are copied, whether or not the runtime holds Python's."""
    program = DeviceProgram(make_tiny())
    program._methods["gradients"] = SlowMethod([(), (tiny.LAYOUT.num_values,)])
    batch = batch_of(program)
    wrong = []

    def work(i: int) -> None:
        values = np.full(tiny.LAYOUT.num_values, i, np.float32)
        for _ in range(20):
            loss, gradient = program.gradients(values, batch, l2_clip_norm=1.0)
            if loss != i or np.any(gradient != i):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_length_below_the_bound_is_padded_up(tiny_program: DeviceProgram) -> None:
    """One token, where the program takes two: the padding changes no score."""
    one = np.array([[4]]), np.array([[1]])
    two = np.array([[4, 0]]), np.array([[1, 0]])
    np.testing.assert_array_equal(
        tiny_program.scores(theta(), *one), tiny_program.scores(theta(), *two)
    )


def test_a_read_only_or_strided_theta_works(tiny_program: DeviceProgram) -> None:
    """A theta straight from a message's bytes cannot be written to."""
    ids, mask = tiny_program.tokenizer.pad(tiny_program.tokenizer.encode(["red"]))
    expected = tiny_program.scores(theta(), ids, mask)
    frozen = np.frombuffer(theta().tobytes(), dtype=np.float32)
    strided = np.repeat(theta(), 2)[::2]
    for values in (frozen, strided):
        np.testing.assert_array_equal(tiny_program.scores(values, ids, mask), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.ones((5, 3), np.int64)}, "expected a batch of 1 to 4, got 5."),
        ({"input_ids": np.ones((0, 3), np.int64)}, "expected a batch of 1 to 4, got 0."),
        ({"input_ids": np.ones((3, 13), np.int64)}, "expected a length of 2 to 12, got 13."),
        ({"attention_mask": np.ones((3, 4), np.int64)}, "expected one length in all inputs, got "),
        ({"labels": np.zeros(2, np.int64)}, "expected one batch in all inputs, got 3 and 2 (lab"),
        (
            {"labels": np.zeros(3, np.int32)},
            "expected labels of int64 (batch), got int32 (3,).",
        ),
        (
            {"example_weights": np.zeros((3, 1), np.float32)},
            "expected example_weights of float32 (batch), got float32 (3, 1).",
        ),
        ({"labels": np.array([0, 5, 0])}, "expected labels in [0, 5), got 0 to 5."),
        ({"labels": np.array([0, -1, 0])}, "expected labels in [0, 5), got -1 to 0."),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_name(
    tiny_program: DeviceProgram, changes: dict[str, Any], message: str
) -> None:
    """Before the runtime sees it: its own errors name nothing."""
    batch = dataclasses.replace(batch_of(tiny_program), **changes)
    with pytest.raises(DeviceError) as caught:
        tiny_program.gradients(theta(), batch, l2_clip_norm=1e30)
    assert str(caught.value).startswith(f"gradients: {message}")


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_the_clip_bound_must_be_positive(tiny_program: DeviceProgram, clip: float) -> None:
    """NaN would pass a comparison written the other way round."""
    with pytest.raises(DeviceError, match=r"expected l2_clip_norm > 0, got"):
        tiny_program.gradients(theta(), batch_of(tiny_program), l2_clip_norm=clip)


def test_token_ids_outside_the_vocabulary_are_an_error_with_shapes(
    tiny_program: DeviceProgram,
) -> None:
    """What only the runtime can notice still comes back as this package's error."""
    with pytest.raises(DeviceError, match=r"scores: the ExecuTorch runtime failed for shapes"):
        tiny_program.scores(theta(), np.full((1, 2), 99), np.ones((1, 2), np.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(12, np.float32), "scores: theta: expected float32 values of shape (13,)"),
        (np.zeros(13, np.float64), "scores: theta: expected float32 values of shape (13,)"),
        (np.full(13, np.nan, np.float32), "scores: theta: 13 of 13 values are not finite."),
    ],
)
def test_a_theta_that_does_not_fit_is_refused(
    tiny_program: DeviceProgram, values: NDArray[Any], message: str
) -> None:
    """Wrong length, wrong dtype, not finite."""
    with pytest.raises(ThetaError) as caught:
        tiny_program.scores(values, np.ones((1, 2), np.int64), np.ones((1, 2), np.int64))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("rows", [1, 4, 5, 23])
def test_rows_are_scored_in_chunks_and_come_back_at_their_places(
    tiny_program: DeviceProgram, rows: int
) -> None:
    """More queries than the program takes at once; each gets what it gets alone."""
    texts = [" ".join(tiny.WORDS[i % 10 :][: i % 7]) for i in range(rows)]
    encoded = tiny_program.tokenizer.encode(texts)
    seen = []
    for places, scores in tiny_program.score_rows(theta(), encoded):
        assert len(places) <= tiny.MAX_BATCH
        for place, row in zip(places, scores, strict=True):
            alone = tiny_program.scores(theta(), *tiny_program.tokenizer.pad([encoded[place]]))
            np.testing.assert_allclose(row, alone[0], rtol=1e-5, atol=1e-6)
        seen += places
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("version", ["1.5.1", "1.5.1+cpu", "1.5.9", "1.5.10rc1"])
def test_a_runtime_inside_the_range_is_taken(version: str) -> None:
    """Local labels do not count, and 10 is more than 9."""
    check_runtime_version(version, RuntimeRange(at_least="1.5.1", below="1.6"))


@pytest.mark.parametrize("version", ["1.5.0", "1.5", "1.6", "1.6.0", "1.6.0a1", "1.10", "2"])
def test_a_runtime_outside_the_range_is_refused(version: str) -> None:
    """The upper end is excluded, with its pre-releases."""
    with pytest.raises(DeviceError) as caught:
        check_runtime_version(version, RuntimeRange(at_least="1.5.1", below="1.6.0"))
    assert str(caught.value) == (
        "expected ExecuTorch 1.5.1 or later and below 1.6.0, which this bundle's program was "
        f"exported for, got {version}. Install such a version, or export the bundle again."
    )


def test_loading_checks_the_runtimes_version(make_tiny: Callable[..., Bundle]) -> None:
    """A program for another runtime is not even opened."""
    bundle = make_tiny(**manifest_with(runtime={"at_least": "9.0", "below": "9.1"}))
    with pytest.raises(DeviceError, match=r"^expected ExecuTorch 9\.0 or later"):
        DeviceProgram.load(bundle)


def test_a_file_that_is_no_program_is_named(tmp_path: Path) -> None:
    """The hashes are right, the content is not."""
    bundle = tiny.write_tiny_bundle(tmp_path / "bundle", b"no program" * 100)
    with pytest.raises(DeviceError, match=r"program\.pte: the ExecuTorch runtime cannot load it"):
        DeviceProgram.load(bundle)


@pytest.mark.parametrize(
    ("method", "inputs", "outputs", "message"),
    [
        ("gradients", -1, None, "gradients: expected 6 inputs and 2 outputs as in the manifest, g"),
        ("scores", "extra", None, "scores takes inputs that this version of carpool does not know"),
        ("gradients", None, -1, "expected gradients to return ('loss', 'gradient'), got ('loss',)"),
    ],
)
def test_a_manifest_that_differs_from_the_program_is_refused(
    make_tiny: Callable[..., Bundle],
    method: str,
    inputs: int | str | None,
    outputs: int | None,
    message: str,
) -> None:
    """Too few inputs would otherwise be noticed by nobody on some platforms."""
    methods = tiny.manifest_fields()["program"]["methods"]
    if inputs == "extra":
        extra = {"name": "temperature", "dtype": "float32", "shape": (1,)}
        methods[method]["inputs"].append(extra)
    elif inputs is not None:
        del methods[method]["inputs"][inputs]
    if outputs is not None:
        del methods[method]["outputs"][outputs]
    with pytest.raises(DeviceError) as caught:
        DeviceProgram.load(make_tiny(**manifest_with(methods=methods)))
    assert f"program.pte: {message}" in str(caught.value)


def test_a_method_that_is_missing_is_named(make_tiny: Callable[..., Bundle]) -> None:
    """A bundle that can score and not train."""
    methods = tiny.manifest_fields()["program"]["methods"]
    del methods["gradients"]
    with pytest.raises(DeviceError, match=r"expected a method 'gradients', got \['gradients', 's"):
        DeviceProgram.load(make_tiny(**manifest_with(methods=methods)))


def test_the_package_imports_neither_transformers_nor_flwr(tiny_bundle: Bundle) -> None:
    """Every module imported, a search done, in a fresh process: neither is there."""
    code = f"""
        import importlib, pkgutil, sys, warnings
        from pathlib import Path
        warnings.simplefilter("ignore")
        import carpool_device
        for module in pkgutil.walk_packages(carpool_device.__path__, "carpool_device."):
            importlib.import_module(module.name)
        from carpool.bundle import Bundle
        from carpool_device.runtime import DeviceProgram
        from carpool_device.search import search
        bundle = Bundle.open(Path({str(tiny_bundle.path)!r}))
        search(DeviceProgram.load(bundle), bundle.initial_theta(), "red", top=1)
        names = [m for m in sys.modules if m.startswith("carpool_device")]
        print(len(names), sorted({{"transformers", "flwr"}} & sys.modules.keys()))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    count, found = run.stdout.split(maxsplit=1)
    assert int(count) >= 14
    assert found.strip() == "[]"


def test_the_commands_are_registered_without_importing_the_runtime() -> None:
    """``carpool --help`` must not wait for torch."""
    code = "import sys, carpool_device.commands; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


def test_a_batch_cannot_be_changed_by_mistake(tiny_program: DeviceProgram) -> None:
    """Its fields are frozen."""
    batch: Any = batch_of(tiny_program)
    assert isinstance(batch, Batch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.labels = np.zeros(3)
