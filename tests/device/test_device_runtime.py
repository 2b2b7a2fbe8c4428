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
from carpool.packing import PackedTokens, pack
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


def by_hand(program: DeviceProgram, texts: Sequence[str] = TEXTS) -> tuple[torch.Tensor, ...]:
    """The query's inputs for the eager model, packed without carpool's packing."""
    return tiny.packed([row.tolist() for row in program.tokenizer.encode(texts)])


def tokens_of(program: DeviceProgram, texts: Sequence[str] = TEXTS) -> PackedTokens:
    return program.tokenizer.pack(program.tokenizer.encode(texts))


def packed(*rows: list[int]) -> PackedTokens:
    return pack([np.array(row, dtype=np.int64) for row in rows], min_length=2)


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
        row = by_hand(tiny_program, TEXTS[i : i + 1])
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
    model = tiny.TinyModel()
    inputs = (torch.from_numpy(theta()), model.documents, *by_hand(tiny_program))
    expected = tiny.Scores(model)(*inputs)
    found = tiny_program.scores(theta(), tokens_of(tiny_program))
    assert found.shape == (3, len(tiny.DOCUMENTS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [theta(), np.zeros(tiny.LAYOUT.num_values, np.float32)])
def test_embeddings_equal_eager_pytorch(
    tiny_program: DeviceProgram, values: NDArray[np.float32]
) -> None:
    """One row per text, with the adapter in it; at theta = 0 the model's own embeddings."""
    found = tiny_program.embed(values, tokens_of(tiny_program))
    model = tiny.TinyModel()
    expected = tiny.Embed(model)(torch.from_numpy(values), *by_hand(tiny_program))
    assert found.shape == (3, tiny.WIDTH)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    own = [model.embeddings[row].mean(0) for row in tiny_program.tokenizer.encode(TEXTS)]
    np.testing.assert_allclose(
        found - 0.5 * values[: tiny.WIDTH], torch.stack(own), rtol=1e-5, atol=1e-6
    )


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


def test_methods_are_loaded_when_used(make_tiny: Callable[..., Bundle]) -> None:
    """And one at a time, because each packs the weights for itself."""
    program = DeviceProgram(make_tiny())
    assert not program._methods
    program.scores(theta(), tokens_of(program))
    assert set(program._methods) == {"scores"}
    program.embed(theta(), tokens_of(program))
    assert set(program._methods) == {"embed"}


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


def test_one_token_is_a_query_and_empty_slots_change_no_score(tiny_program: DeviceProgram) -> None:
    """The program takes two slots or more: the tokenizer adds what one token leaves empty."""
    row = np.array([4])
    one = tiny_program.tokenizer.pack([row])
    assert one.slot_tokens.tolist() == [[0, -1]]
    model = tiny.TinyModel()
    inputs = (torch.from_numpy(theta()), model.documents, *tiny.packed([[4]]))
    found = tiny_program.scores(theta(), one)
    np.testing.assert_allclose(found, tiny.Scores(model)(*inputs), rtol=1e-5, atol=1e-6)
    more = pack([row], min_length=tiny.MAX_LENGTH)
    np.testing.assert_array_equal(tiny_program.scores(theta(), more), found)


def test_a_read_only_or_strided_theta_works(tiny_program: DeviceProgram) -> None:
    """A theta straight from a message's bytes cannot be written to."""
    tokens = tokens_of(tiny_program, ["red"])
    expected = tiny_program.scores(theta(), tokens)
    frozen = np.frombuffer(theta().tobytes(), dtype=np.float32)
    strided = np.repeat(theta(), 2)[::2]
    for values in (frozen, strided):
        np.testing.assert_array_equal(tiny_program.scores(values, tokens), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": packed(*[[4, 5, 6]] * 5)}, "expected batch in [1, 4], got 5."),
        ({"slot_tokens": np.zeros((0, 5), np.int64)}, "expected batch in [1, 4], got 0."),
        ({"tokens": packed([4] * 13, [4], [4])}, "expected length in [2, 12], got 13."),
        ({"slot_tokens": np.zeros((3, 1), np.int64)}, "expected length in [2, 12], got 1."),
        ({"tokens": packed([], [], [])}, "expected tokens in [1, 48], got 0."),
        ({"token_ids": np.full(49, 4)}, "expected tokens in [1, 48], got 49."),
        (
            {"token_rows": np.zeros(4, np.int64)},
            "expected one number of tokens in all inputs, got 12 and 4 (token_rows).",
        ),
        (
            {"token_positions": np.zeros(13, np.int64)},
            "expected one number of tokens in all inputs, got 12 and 13 (token_positions).",
        ),
        (
            {"token_ids": np.ones(12, np.int32)},
            "expected token_ids of int64 (tokens), got int32 (12,).",
        ),
        (
            {"slot_tokens": np.zeros(12, np.int64)},
            "expected slot_tokens of int64 (batch, length), got int64 (12,).",
        ),
        (
            {"labels": np.zeros(2, np.int64)},
            "expected one number of batch in all inputs, got 3 and 2 (labels).",
        ),
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
    batch = batch_of(tiny_program)
    of_tokens = {name: changes[name] for name in changes.keys() & batch.tokens.named().keys()}
    tokens = {"tokens": dataclasses.replace(batch.tokens, **of_tokens)}
    others = {name: changes[name] for name in changes.keys() - of_tokens.keys()}
    batch = dataclasses.replace(batch, **(tokens | others))
    with pytest.raises(DeviceError) as caught:
        tiny_program.gradients(theta(), batch, l2_clip_norm=1e30)
    assert str(caught.value) == f"gradients: {message}"


def test_a_method_has_bounds_of_its_own(make_tiny: Callable[..., Bundle]) -> None:
    """Texts to embed may be longer than queries, so one method's bounds are not another's."""
    methods = tiny.manifest_fields()["program"]["methods"]
    methods["scores"]["bounds"] = methods["scores"]["bounds"] | {"length": {"min": 2, "max": 4}}
    program = DeviceProgram(make_tiny(**manifest_with(methods=methods)))
    tokens = packed([4] * 5)
    with pytest.raises(DeviceError, match=r"^scores: expected length in \[2, 4\], got 5\.$"):
        program.scores(theta(), tokens)
    assert program.embed(theta(), tokens).shape == (1, tiny.WIDTH)


def test_other_frozen_inputs_take_the_place_of_the_bundles(tiny_program: DeviceProgram) -> None:
    """For one call; the bundle's own, given by name, change no bit."""
    batch, model = batch_of(tiny_program), tiny.TinyModel()
    own = tiny_program.bundle.corpus()
    others = torch.flip(model.documents, [0]).contiguous()
    before = tiny_program.scores(theta(), batch.tokens)
    np.testing.assert_array_equal(tiny_program.scores(theta(), batch.tokens, frozen=own), before)

    found = tiny_program.scores(theta(), batch.tokens, frozen={"documents": others.numpy()})
    query = by_hand(tiny_program)
    expected = tiny.Scores(model)(torch.from_numpy(theta()), others, *query)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    _, gradient = tiny_program.gradients(
        theta(), batch, l2_clip_norm=1.0, frozen={"documents": others.numpy()}
    )
    labels, weights = torch.from_numpy(batch.labels), torch.from_numpy(batch.example_weights)
    _, eager = tiny.Gradients(model)(
        torch.from_numpy(theta()), others, *query, labels, weights, torch.tensor([1.0])
    )
    np.testing.assert_allclose(gradient, eager, atol=1e-5 * eager.abs().max())
    np.testing.assert_array_equal(tiny_program.scores(theta(), batch.tokens), before)


Call = Callable[[DeviceProgram, NDArray[np.float32], dict[str, NDArray[np.float32]]], object]
CALLS: dict[str, Call] = {
    "gradients": lambda program, values, frozen: program.gradients(
        values, batch_of(program, labels=(0, 0, 0)), l2_clip_norm=1.0, frozen=frozen
    ),
    "scores": lambda program, values, frozen: program.scores(
        values, tokens_of(program), frozen=frozen
    ),
    "embed": lambda program, values, frozen: program.embed(
        values, tokens_of(program), frozen=frozen
    ),
}


@pytest.mark.parametrize("more", [0, 1], ids=["theta as it was", "theta of the other catalogue"])
@pytest.mark.parametrize("name", CALLS)
def test_another_number_of_documents_is_refused_where_the_program_has_a_fixed_one(
    tiny_program: DeviceProgram, name: str, more: int
) -> None:
    """Whole message, whatever theta's length: the documents are what does not fit."""
    documents = np.zeros((len(tiny.DOCUMENTS) + 1, tiny.WIDTH), np.float32)
    values = np.zeros(tiny.LAYOUT.num_values + more, np.float32)
    with pytest.raises(DeviceError) as caught:
        CALLS[name](tiny_program, values, {"documents": documents})
    assert str(caught.value) == (
        f"{name}: expected 5 documents, the number that this program was made for, got 6."
    )


@pytest.fixture
def any_catalogue(make_tiny: Callable[..., Bundle]) -> DeviceProgram:
    """A manifest that lets a call choose the documents, before methods that compute nothing."""
    shapes = {
        "theta": ("values",),
        "gradient": ("values",),
        "documents": ("documents", tiny.WIDTH),
        "scores": ("batch", "documents"),
    }
    methods = tiny.manifest_fields()["program"]["methods"]
    for name, method in methods.items():
        for spec in (*method["inputs"], *method["outputs"]):
            spec["shape"] = shapes.get(spec["name"], spec["shape"])
        if name != "embed":
            method["bounds"] = method["bounds"] | {"documents": {"min": 2, "max": 9}}
    program = DeviceProgram(make_tiny(**manifest_with(methods=methods, values_per_document=1)))
    program._methods = {
        name: LendingMethod([(1,)] * len(methods[name]["outputs"])) for name in CALLS
    }
    return program


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("count", [2, 5, 9])
def test_theta_is_as_long_as_the_calls_documents_make_it(
    any_catalogue: DeviceProgram, name: str, count: int
) -> None:
    """A value for each; the bundle's own theta fits its own catalogue alone."""
    frozen = {"documents": np.zeros((count, tiny.WIDTH), np.float32)}
    for extra in (-1, 1):
        with pytest.raises(DeviceError) as caught:
            CALLS[name](any_catalogue, np.zeros(tiny.WIDTH + count + extra, np.float32), frozen)
        assert str(caught.value) == (
            f"{name}: expected a theta of {tiny.WIDTH + count} values for {count} documents, got "
            f"shape ({tiny.WIDTH + count + extra},)."
        )
    CALLS[name](any_catalogue, np.zeros(tiny.WIDTH + count, np.float32), frozen)


@pytest.mark.parametrize("name", ["gradients", "scores"])
@pytest.mark.parametrize("count", [1, 10])
def test_documents_have_bounds_too(any_catalogue: DeviceProgram, name: str, count: int) -> None:
    """Memory is planned for them, as for the tokens."""
    frozen = {"documents": np.zeros((count, tiny.WIDTH), np.float32)}
    with pytest.raises(DeviceError, match=rf"{name}: expected documents in \[2, 9\], got {count}"):
        CALLS[name](any_catalogue, np.zeros(tiny.WIDTH + count, np.float32), frozen)


@pytest.mark.parametrize("count", [3, 8])
def test_labels_are_of_the_calls_documents(any_catalogue: DeviceProgram, count: int) -> None:
    """Not of the bundle's, of which there are five."""
    frozen = {"documents": np.zeros((count, tiny.WIDTH), np.float32)}
    values = np.zeros(tiny.WIDTH + count, np.float32)

    def call(label: int) -> None:
        batch = batch_of(any_catalogue, ["red"], [label])
        any_catalogue.gradients(values, batch, l2_clip_norm=1.0, frozen=frozen)

    call(count - 1)
    with pytest.raises(DeviceError) as caught:
        call(count)
    assert str(caught.value) == (
        f"gradients: expected labels in [0, {count}), got {count} to {count}."
    )


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
        tiny_program.scores(theta(), packed([99, 99]))


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
        tiny_program.scores(values, packed([4, 5]))
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
            alone = tiny_program.scores(theta(), tiny_program.tokenizer.pack([encoded[place]]))
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
        ("gradients", -1, None, "gradients: expected 8 inputs and 2 outputs as in the manifest, g"),
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


def test_a_method_that_is_missing_is_named(tmp_path: Path) -> None:
    """The manifest promises three, and the program can only embed."""
    bundle = tiny.write_tiny_bundle(tmp_path / "bundle", tiny.program_bytes("embed"))
    with pytest.raises(
        DeviceError, match=r"program\.pte: expected a method 'gradients', got \['embed'\]\.$"
    ):
        DeviceProgram.load(bundle)


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
