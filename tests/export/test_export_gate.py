"""A whole export of a tiny model, and the gate that a wrong program does not pass."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from export_cases import Case
from safetensors.torch import load_file, save_file

from carpool.bundle import Bundle
from carpool.errors import ExportError, ParityError
from carpool_export import gate, program
from carpool_export.exporter import STAGES, export_bundle
from carpool_export.gate import check_parity, gate_shapes
from carpool_export.gate_texts import GateTexts
from carpool_export.lowering import decompositions
from carpool_export.model import Packing, loading
from carpool_export.parity import measure_trajectory, random_batch, relative_error
from carpool_export.program import StepFunctions
from carpool_export.runner import LoadedProgram
from carpool_export.settings import ExportSettings
from carpool_export.trainables import PRESETS

aten = torch.ops.aten

SETTINGS = ExportSettings(max_length=16, document_length=16, max_batch=4)


def export(model: Path, documents: Path, out: Path, **changes: object) -> tuple[Bundle, list[str]]:
    stages: list[str] = []
    settings = ExportSettings(**(SETTINGS.__dict__ | changes))  # type: ignore[arg-type]
    bundle = export_bundle(str(model), documents, out, settings, announce=stages.append)
    return bundle, stages


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_tiny_model_becomes_a_bundle(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path, preset: str
) -> None:
    """Other sizes than MiniLM's: nine documents, so the core's rank is lowered to nine."""
    bundle, stages = export(
        tiny_model, tiny_documents, tmp_path / "bundle", kinds=PRESETS[preset], scales={}
    )
    assert stages == list(STAGES)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest == bundle.manifest
    assert manifest.model.name == "Tiny"
    assert manifest.licences[1].notice == "Written for a test."
    shapes = {segment.name: segment.shape for segment in manifest.layout.segments}
    assert (
        shapes
        == {
            "small": {
                "adapter.scale": (24,),
                "adapter.bias": (24,),
                "head.core": (9, 9),
                "head.bias": (9,),
            },
            "paper": {"adapter.weight": (24, 24), "head.rows": (9, 24)},
        }[preset]
    )
    basis = bundle.corpus().get("basis")
    if basis is not None:
        assert abs(basis.T @ basis - torch.eye(9).numpy()).max() <= 1e-6


def one_part_in_ten_thousand(patch: pytest.MonkeyPatch) -> None:
    key = aten.native_layer_norm_backward.default
    right = decompositions.DECOMPOSITIONS[key]

    def slightly_wrong(*arguments: object) -> tuple[object, ...]:
        gradient, *rest = right(*arguments)
        return (gradient * 1.0001, *rest)

    patch.setitem(decompositions.DECOMPOSITIONS, key, slightly_wrong)


def a_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    right = decompositions.DECOMPOSITIONS[aten.gelu_backward.default]
    patch.setitem(
        decompositions.DECOMPOSITIONS,
        aten.gelu_backward.default,
        lambda grad, x, **options: right(grad, -x, **options),
    )


def erf_for_tanh(patch: pytest.MonkeyPatch) -> None:
    """What XNNPACK's serialiser makes of a gelu that nobody took apart."""
    patch.delitem(decompositions.DECOMPOSITIONS, aten.gelu.default)


def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Packing, "mask_BT", property(lambda self: (self.slots_BT >= 1).float()))


def dropped_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(program, "_total", lambda terms: terms[0] * 0.0)


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    right = StepFunctions._offsets

    def off(self: StepFunctions, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: 1.001 * values for name, values in right(self, call).items()}

    patch.setattr(StepFunctions, "_offsets", off)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "activation"),
    [
        (one_part_in_ten_thousand, "gelu"),
        (a_wrong_sign, "gelu"),
        (erf_for_tanh, "gelu_pytorch_tanh"),
        (mask_off_by_one, "gelu"),
        (dropped_clip, "gelu"),
        (wrong_scale, "gelu"),
    ],
)
def test_wrong_program_is_not_written(  # noqa: PLR0917  fixtures
    tiny_model: Path,
    tiny_documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change_json: Callable[..., None],
    plant: Callable[[pytest.MonkeyPatch], None],
    activation: str,
) -> None:
    """Faults of the kinds that such a compiler has: each shows at one of the shapes."""
    change_json(tiny_model / "config.json", hidden_act=activation)
    weights = load_file(tiny_model / "model.safetensors")
    weights["encoder.layer.0.intermediate.dense.weight"] *= 40  # gelu is nearly a line at 0
    save_file(weights, tiny_model / "model.safetensors", metadata={"format": "pt"})
    plant(monkeypatch)
    monkeypatch.setattr(loading, "_check_on_probe", lambda *_: None)  # the gate alone must do
    with pytest.raises(
        ParityError,
        match=r"^(gradient|scores) at batch \d, length \d+: expected an error of at most "
        r"\d\.\de-0[56] of the largest eager value, got (\d\.\de[+-]\d\d|inf)\. No bundle was "
        r"written; this model cannot be exported as it is\.$",
    ):
        export(tiny_model, tiny_documents, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["NOTICE", "documents.jsonl", "tiny"]


def test_gate_refuses_a_program_of_another_function(small: Case) -> None:
    """The right program against a reference with a logit scale that is off by 0.01 %."""
    other = dataclasses.replace(small.reference, logit_scale=20.002)
    with pytest.raises(ParityError, match=r"^gradient at batch 1, length 2: expected an error of"):
        check_parity(
            small.program,
            other,
            texts=texts_of(small),
            shapes=[(1, 2)],
            embed_length=2,
            catalogues=[],
            vocabulary=30522,
        )


def texts_of(case: Case) -> GateTexts:
    return GateTexts(
        tokenizer_path=case.bundle.tokenizer_path,
        prompt="",
        passages=[document.passage for document in case.bundle.documents()],
    )


class _Drifting(LoadedProgram):
    """Adds a last bit to every gradient after the third."""

    calls = 0

    def call(self, method: str, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        found = super().call(method, values)
        self.calls += method == "gradients"
        if method == "gradients" and self.calls > 3:
            found[1] = torch.nextafter(found[1], torch.tensor(1.0))
        return found


def test_gate_refuses_a_program_whose_calls_leave_something_behind(small: Case) -> None:
    """One last bit, far below every limit."""
    drifting = _Drifting(small.bundle.program_path, small.bundle.manifest.program.methods)
    with pytest.raises(ParityError, match="expected the same bits from the same call, got others"):
        check_parity(
            drifting,
            small.reference,
            texts=texts_of(small),
            shapes=[(1, 4)],
            embed_length=4,
            catalogues=[],
            vocabulary=30522,
        )


def test_a_trajectory_ends_where_eager_does_and_not_elsewhere(small: Case) -> None:
    """Twenty steps; a logit scale that is off by 0.1 % leads away."""
    texts = texts_of(small)
    batches = [texts.batch(batch=2, length=12, num_documents=598, seed=step) for step in range(20)]
    right = measure_trajectory(small.program, small.reference, batches).trajectory
    other = dataclasses.replace(small.reference, logit_scale=20.02)
    wrong = measure_trajectory(small.program, other, batches).trajectory
    assert 0 < right <= gate.TRAJECTORY_GATE < wrong


def test_gate_rows_are_text_of_the_lengths_asked_for(small: Case) -> None:
    """Whole rows of the tokenizer's own, special tokens in place; one row without weight."""
    batch = texts_of(small).batch(batch=5, length=33, num_documents=7, seed=0)
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[0] == 33
    assert len(set(lengths)) > 1
    assert min(lengths) >= 2
    for row, length in zip(batch.input_ids.tolist(), lengths, strict=True):
        assert (row[0], row[length - 1]) == (101, 102)  # [CLS] and [SEP] of MiniLM's vocabulary
    assert batch.example_weights[-1] == 0
    assert float(batch.example_weights.sum()) == pytest.approx(1)
    assert 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < 7


def test_operator_that_cannot_be_lowered_is_an_export_error(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the libraries raise arrives as one line, and nothing is written."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nand a long explanation")

    key = aten.native_layer_norm.default
    monkeypatch.setitem(decompositions.DECOMPOSITIONS, key, broken)
    message = "the program could not be lowered: RuntimeError: no kernel"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export(tiny_model, tiny_documents, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_missing_weights_are_refused(
    tiny_model: Path, tiny_documents: Path, tmp_path: Path
) -> None:
    """The library would fill them with random numbers."""
    path = tiny_model / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError) as error:
        export(tiny_model, tiny_documents, tmp_path / "bundle")
    assert str(error.value) == (
        f"{tiny_model}: 1 of the model's weights are not in model.safetensors, among them "
        "encoder.layer.0.output.dense.weight; expected all of them."
    )


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ([0.0], [0.0], 0.0),
        ([0.1], [0.0], float("inf")),
    ],
)
def test_relative_error_is_a_share_of_the_largest_value(
    found: list[float], expected: list[float], error: float
) -> None:
    """And infinite where anything is not finite or missing."""
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == pytest.approx(error)


def test_gate_visits_the_corners_within_the_bounds() -> None:
    """The issue's shapes at the default bounds; fewer where the bounds are smaller."""
    assert gate_shapes(max_batch=8, max_length=64) == [
        (1, 2),
        (1, 64),
        (3, 17),
        (5, 33),
        (8, 32),
        (8, 64),
    ]
    assert gate_shapes(max_batch=2, max_length=5) == [(1, 2), (1, 5), (2, 5)]


def test_runner_refuses_too_few_inputs(small_bundle: Path) -> None:
    """The runtime itself would take the earlier call's values for the missing ones."""
    methods = Bundle.open(small_bundle).manifest.program.methods
    few = methods["scores"].model_copy(update={"inputs": methods["scores"].inputs[:1]})
    program = LoadedProgram(small_bundle / "program.pte", {"scores": few})
    with pytest.raises(ValueError, match=r"^scores: expected 7 inputs, got 1\.$"):
        program.call("scores", {"theta": torch.zeros(1)})


def test_random_batches_have_padding_and_a_row_without_weight() -> None:
    """What the gate claims to try, it tries."""
    batch = random_batch(batch=5, length=33, vocabulary=100, num_documents=7, seed=0)
    assert batch.example_weights[-1] == 0
    assert int(batch.attention_mask.sum(1).min()) < 33
    assert float(batch.example_weights.sum()) == pytest.approx(1.0)
