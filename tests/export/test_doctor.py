"""``carpool doctor``: what it finds in programs of which the truth is known."""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.export import Dim, export
from typer.testing import CliRunner, Result

from carpool.bundle import Bundle
from carpool.errors import BundleError, CarpoolError, ConfigError
from carpool.files import sha256_of_file
from carpool_export.commands import register
from carpool_export.doctor import render
from carpool_export.doctor.examine import Settings, examine
from carpool_export.doctor.findings import find
from carpool_export.doctor.inputs import bundle_calls
from carpool_export.doctor.products import Product
from carpool_export.doctor.program import StaticTensor, _covered, _Planned, methods_of, parts_of
from carpool_export.doctor.report import (
    Delegates,
    Operator,
    Report,
)
from carpool_export.lowering import MethodToLower, lower
from carpool_export.lowering.private.pte import read_pte

ROWS, WIDTH, HIDDEN = 64, 96, 160


def run_doctor(*arguments: object) -> Result:
    """Runs the command; a CarpoolError comes through as itself."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Network(torch.nn.Module):
    """Two layers whose products take nearly all of the time where kernels are portable."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Float32, ``(ROWS, WIDTH)`` to the same."""
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def stock_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ExecuTorch's own first example exports: no partitioner, portable kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge  # noqa: PLC0415

        program = to_edge(export(Network().eval(), (torch.randn(ROWS, WIDTH),))).to_executorch()
    path = tmp_path_factory.mktemp("stock") / "stock.pte"
    path.write_bytes(program.buffer)
    return path


@pytest.fixture(scope="module")
def stock_report(stock_pte: Path) -> Report:
    return examine(stock_pte, Settings(repeats=5), announce=lambda _: None)


@pytest.fixture(scope="module")
def tiny_bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny.write_tiny_bundle(path, tiny.program_bytes())
    return path


def severities(report: Report, severity: str) -> list[str]:
    return [finding.what for finding in report.findings if finding.severity == severity]


def test_stock_export_names_addmm_as_the_slowest_with_its_share(stock_report: Report) -> None:
    """The bar of the issue: a portable product is named, with its share and what to do."""
    (method,) = stock_report.methods
    assert method.measured is not None
    slowest = method.measured.kernels[0]
    assert (slowest.name, slowest.backend, slowest.calls) == ("aten::addmm.out", None, 2)
    assert slowest.share > 0.5  # 2 products of 64 x 96 x 160 against 10,240 maxima
    finding = stock_report.findings[0]
    assert finding.severity == "warning"
    assert finding.what.startswith(f"aten::addmm.out takes {slowest.share:.0%} of forward (")
    assert "lower_gradient_program" in finding.do
    assert stock_report.healthy


def test_shares_of_kernels_and_the_rest_add_up_to_the_call(stock_report: Report) -> None:
    """Of the same calls' mean, so that nothing is lost or counted twice."""
    measured = stock_report.methods[0].measured
    assert measured is not None
    assert sum(k.share for k in measured.kernels) + measured.rest_share == pytest.approx(1)
    assert measured.rest_share >= 0


def test_static_facts_of_a_stock_export_are_those_of_the_network(stock_report: Report) -> None:
    """Inputs, operators, operations and weights, each from the network's own sizes."""
    (method,) = stock_report.methods
    assert [(t.shape, t.dtype, t.dynamic) for t in method.inputs] == [
        ((ROWS, WIDTH), "float32", False)
    ]
    assert method.delegates == ()
    assert Operator(name="aten::addmm.out", calls=2, on_android=True) in method.operators
    assert method.measured is not None
    roofline = method.measured.roofline
    assert roofline is not None
    assert roofline.gigaflop == pytest.approx(2 * 2 * ROWS * WIDTH * HIDDEN / 1e9)
    assert (roofline.products, roofline.uncounted, roofline.counted) == (2, 0, "all")
    weights = sum(part.bytes for part in stock_report.parts if part.frozen)
    assert weights >= sum(4 * p.numel() for p in Network().parameters())
    assert sum(part.bytes for part in stock_report.parts) == stock_report.file_bytes


def test_arena_holds_the_hidden_layer(stock_report: Report) -> None:
    """At most in use at once: a layer's input, its output, and the weight that addmm copies."""
    arena = stock_report.methods[0].arena
    hidden = 4 * ROWS * HIDDEN
    assert hidden < arena.most_in_use_bytes <= arena.bytes
    assert (ROWS, HIDDEN) in {group.shape for group in arena.largest}
    assert all(group.bytes == 4 * group.count * math.prod(group.shape) for group in arena.largest)


def test_a_view_takes_no_room_beside_what_it_is_a_view_of() -> None:
    """Bytes of the arena are counted once, whoever lies on them; two memories are two."""
    hundred = StaticTensor(dtype=torch.float32, shape=(5, 5), dynamic=False)
    forty = StaticTensor(dtype=torch.float32, shape=(10,), dynamic=False)
    values = [
        _Planned(hundred, memory=1, start=0, first=0, last=9),
        _Planned(forty, memory=1, start=20, first=0, last=9),
        _Planned(forty, memory=1, start=80, first=0, last=9),
        _Planned(forty, memory=2, start=0, first=0, last=9),
    ]
    assert _covered(values) == 120 + 40


FACTOR = torch.nn.Linear(24, 40).requires_grad_(requires_grad=False)


def frozen_and_run_time_products(theta: Tensor, x: Tensor) -> Tensor:
    """One product by a frozen weight, one by theta."""
    return FACTOR(x) @ theta


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two methods through our own compiler, and the ETRecord of it."""
    folder = tmp_path_factory.mktemp("lowered")
    pte, record = folder / "two.pte", folder / "two.etrecord"
    methods = {
        name: MethodToLower(
            function=frozen_and_run_time_products,
            example_inputs=(torch.zeros(40, 8), torch.zeros(7, 24)),
            dynamic_shapes=(None, {0: Dim("rows", min=1, max=most)}),
        )
        for name, most in (("one", 9), ("other", 33))
    }
    pte.write_bytes(lower(methods, progress=lambda _: None, etrecord=record))
    return pte, record


def test_products_inside_of_delegates_are_counted(lowered: tuple[Path, Path]) -> None:
    """XNNPACK's graphs are read: sizes at the bounds, frozen or not."""
    found = {method.name: method for method in methods_of(read_pte(lowered[0]))}
    assert set(found) == {"one", "other"}
    for name, rows in (("one", 9), ("other", 33)):
        method = found[name]
        products = {p.frozen: p for p in method.products}
        assert [d.backend for d in method.delegates] == ["XnnpackBackend"]
        assert products[True].operations({}) == 2 * rows * 24 * 40
        assert products[False].operations({}) == 2 * rows * 40 * 8
        assert products[True].operations({rows: 5}) == 2 * 5 * 24 * 40
        assert products[True].operations({rows: None}) is None
    assert Product(frozen=True, rows=None).operations({}) is None


def test_weights_are_found_where_delegates_share_them(lowered: tuple[Path, Path]) -> None:
    """Once for two methods: the frozen layer and nothing else."""
    file = read_pte(lowered[0])
    parts = {part.name: part for part in parts_of(file)}
    shared = parts["weights that delegates share (named data)"]
    assert shared.frozen
    assert 4 * (24 * 40 + 40) <= shared.bytes < 2 * 4 * 24 * 40
    assert sum(part.bytes for part in parts.values()) == file.file_bytes


@pytest.mark.slow
def test_etrecord_says_what_delegates_are_made_from(lowered: tuple[Path, Path]) -> None:
    """Of each method its own, though ExecuTorch's Inspector knows one method alone."""
    pte, record = lowered
    report = examine(pte, Settings(repeats=2, etrecord=record), announce=lambda _: None)
    for method in report.methods:
        assert method.measured is not None
        (delegate,) = method.measured.delegates
        assert sum("linear" in name for name in delegate.operators) == 1
    assert "Slowest delegates" in rendered(report)


def test_an_etrecord_that_does_not_fit_is_refused_before_anything_runs(
    lowered: tuple[Path, Path], stock_pte: Path, tmp_path: Path
) -> None:
    """Of another program, or none at all."""
    with pytest.raises(BundleError, match=r"with the method 'forward', got one with \['one', "):
        examine(stock_pte, Settings(etrecord=lowered[1]), announce=lambda _: None)
    (tmp_path / "no.etrecord").write_text("no")
    with pytest.raises(BundleError, match=r"no\.etrecord: expected an ETRecord, got"):
        examine(stock_pte, Settings(etrecord=tmp_path / "no.etrecord"), announce=lambda _: None)


@pytest.fixture(scope="module")
def tiny_run(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The command on a bundle, and where it kept its ETDumps."""
    dumps = tmp_path_factory.mktemp("kept") / "dumps"
    return run_doctor(tiny_bundle, "--json", "--repeats", 2, "--etdump", dumps), dumps


def test_json_alone_is_printed_and_is_the_report(tiny_run: tuple[Result, Path]) -> None:
    """Of the report's own schema; ETDumps of all methods are kept."""
    result, dumps = tiny_run
    assert result.exit_code == 0, result.output
    report = Report.model_validate_json(result.stdout)
    assert {m.name for m in report.methods} == {"gradients", "scores", "embed"}
    assert {f"{m.name}.etdp" for m in report.methods} == {path.name for path in dumps.iterdir()}


def test_a_whole_bundle_has_no_problem(
    tiny_run: tuple[Result, Path], tiny_bundle: Path, tiny: ModuleType
) -> None:
    """All of the golden step is replayed; what is the bundle's own is told as it is."""
    report = Report.model_validate_json(tiny_run[0].stdout)
    assert severities(report, "problem") == []
    assert report.bundle is not None
    assert [check.passed for check in report.bundle.replay] == [True] * 4
    assert [s.name for s in report.bundle.theta] == [s.name for s in tiny.LAYOUT.segments]
    assert all(s.gradient_largest for s in report.bundle.theta)
    theta = tiny_bundle / "theta.safetensors"
    assert report.bundle.bytes_per_round == 2 * (theta.stat().st_size - header_bytes(theta))
    assert "The manifest names no licence." in severities(report, "warning")
    gradients = next(m for m in report.methods if m.name == "gradients")
    assert gradients.bounds["tokens"].max == tiny.MAX_BATCH * tiny.MAX_LENGTH
    assert gradients.inputs[2].shape == ("tokens",)
    assert gradients.inputs[2].largest_bytes == 8 * gradients.bounds["tokens"].max


def test_report_fits_a_terminal_and_ends_with_the_findings(tiny_run: tuple[Result, Path]) -> None:
    """100 columns; the gravest finding first, with what to do."""
    report = Report.model_validate_json(tiny_run[0].stdout)
    text = rendered(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("Licences") < text.index("Findings") < text.index("names no licence")
    for finding in report.findings:
        shown = "" if finding.severity == "ok" else finding.do
        assert " ".join(shown.split()) in " ".join(text.split())


def header_bytes(path: Path) -> int:
    """Of a safetensors file: its length field and the JSON that follows."""
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return 8 + int(length)


def rendered(report: Report) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        render.show(report, console)
    return captured.get()


def rehashed(bundle: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose golden arrays are changed and whose manifest vouches for them."""
    out.mkdir()
    for path in bundle.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    golden, manifest = out / "golden.safetensors", out / "manifest.json"
    texts = json.dumps(["red cat sleeps", "stone"])
    arrays = load_file(golden)
    change(arrays)
    save_file(arrays, golden, metadata={"texts": texts})
    fields = json.loads(manifest.read_text())
    fields["files"][golden.name] = {
        "bytes": golden.stat().st_size,
        "sha256": sha256_of_file(golden),
    }
    manifest.write_text(json.dumps(fields))
    return out


def test_a_changed_golden_step_is_a_problem_and_rows_without_weight_train_nothing(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """The hashes fit; the results do not. No row counts, so no segment gets a gradient."""

    def change(arrays: dict[str, Any]) -> None:
        arrays["example_weights"][:] = 0

    changed = rehashed(tiny_bundle, tmp_path / "changed", change)
    result = run_doctor(changed, "--json", "--repeats", 1)
    assert result.exit_code == 1
    report = Report.model_validate_json(result.stdout)
    assert [what.partition(" is off by 1;")[0] for what in severities(report, "problem")] == [
        "Golden step: loss",
        "Golden step: gradient",
    ]
    nothing = [what for what in severities(report, "warning") if "gets no gradient at all" in what]
    assert [what.partition(" ")[0] for what in nothing] == ["adapter.bias", "head.bias"]


def test_an_operator_that_no_runtime_has_is_a_problem(stock_pte: Path, tmp_path: Path) -> None:
    """Its kernel is missing here and on Android; the rest of the report is there."""
    path = tmp_path / "unknown.pte"
    path.write_bytes(stock_pte.read_bytes().replace(b"aten::addmm", b"aten::adzmm"))
    result = run_doctor(path, "--json")
    assert result.exit_code == 1
    report = Report.model_validate_json(result.stdout)
    problems = severities(report, "problem")
    assert any(what.startswith("forward does not run: ") for what in problems)
    assert "aten::adzmm.out has no kernel in the Android runtime." in problems
    assert report.methods[0].measured is None
    assert "does not run" in rendered(report)


def test_other_backends_and_a_busy_machine_are_noticed(stock_report: Report) -> None:
    """What no test machine can be made to show, put into a true report."""
    (method,) = stock_report.methods
    assert method.measured is not None
    assert method.measured.roofline is not None
    fast = method.measured.roofline.model_copy(update={"kernels_share_of_peak": 1.5})
    changed = method.model_copy(
        update={
            "delegates": (Delegates(backend="CoreMLBackend", calls=1),),
            "measured": method.measured.model_copy(update={"roofline": fast}),
        }
    )
    found = {f.what: f for f in find(stock_report.model_copy(update={"methods": (changed,)}))}
    assert found["forward needs the backend CoreMLBackend."].severity == "warning"
    busy = "The products of forward run at 150% of the peak that was measured"
    assert any(what.startswith(busy) for what in found)


def test_the_golden_step_is_resized_by_repeating_its_rows_and_tokens(
    tiny_bundle: Path, tiny: ModuleType
) -> None:
    """As many rows and tokens as were asked for; the golden call itself stays as it is."""
    bundle = Bundle.open(tiny_bundle)
    golden, _ = bundle.golden()
    call = bundle_calls(bundle, golden, batch=3, length=7)["gradients"]
    names = [spec.name for spec in bundle.manifest.program.methods["gradients"].inputs]
    measured = dict(zip(names, call.inputs, strict=True))
    rows = [[2, 4, 7, 11, 3, 2, 4], [2, 13, 3, 2, 13, 3, 2], [2, 4, 7, 11, 3, 2, 4]]
    assert measured["token_ids"].tolist() == [token for row in rows for token in row]
    assert measured["slot_tokens"].shape == (3, 7)
    assert measured["labels"].tolist() == [0, 3, 0]
    assert measured["example_weights"].sum() == pytest.approx(1)
    assert call.sizes == {tiny.MAX_BATCH: 3, tiny.MAX_LENGTH: 7, 48: 21}
    assert call.golden is not None
    assert dict(zip(names, call.golden, strict=True))["token_ids"].shape == (8,)


@pytest.mark.slow
def test_a_real_bundle_is_healthy_and_its_frozen_products_are_all_found(small_bundle: Path) -> None:
    """Six layers of six products, forward and backward, and little beside them."""
    settings = Settings(batch=8, length=32, repeats=5)
    report = examine(small_bundle, settings, announce=lambda _: None)
    assert severities(report, "problem") == []
    # shares of the time are not asserted: on a busy machine they are anything
    assert [text for text in severities(report, "warning") if "outside of any" not in text] == []
    lines = {m.name: m.measured.roofline for m in report.methods if m.measured is not None}
    layer = 2 * (4 * 384 * 384 + 2 * 384 * 1536)  # operations per token
    for name, passes in (("gradients", 2), ("scores", 1), ("embed", 1)):
        line = lines[name]
        assert line is not None
        assert (line.counted, line.uncounted) == ("frozen", 0)
        assert line.products > 36 * passes  # norms' sums are products by constants, too
        assert 1 < line.gigaflop / (6 * passes * layer * 8 * 32 / 1e9) < 1.03
        assert line.kernels_share_of_peak is not None


def test_a_golden_step_without_an_array_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """By name, before anything runs."""

    def change(arrays: dict[str, Any]) -> None:
        del arrays["labels"]

    changed = rehashed(tiny_bundle, tmp_path / "changed", change)
    with pytest.raises(BundleError, match=r"golden\.safetensors: expected arrays \['labels'\]"):
        examine(changed, Settings(), announce=lambda _: None)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0, "does not begin like one"),
        (5, "does not begin like one"),
        (200, "is truncated"),
        (3000, "is truncated"),
        (-1000, "is truncated"),
    ],
)
def test_a_truncated_program_is_said_to_be_one(
    lowered: tuple[Path, Path], tmp_path: Path, kept: int, expected: str
) -> None:
    """Wherever it ends: before the header, in the program or in the weights."""
    path = tmp_path / "cut.pte"
    path.write_bytes(lowered[0].read_bytes()[:kept])
    with pytest.raises(BundleError, match=expected):
        examine(path, Settings(), announce=lambda _: None)


def test_what_is_no_program_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    """No such path, another file, a folder without a manifest, sizes that do not apply."""
    text = tmp_path / "text.pte"
    text.write_text("not a program")
    noise = tmp_path / "noise.pte"
    noise.write_bytes(b"\x08\0\0\0ET12" + bytes(range(256)))
    for path, message in (
        (tmp_path / "none.pte", r"none\.pte: expected a bundle's folder or a \.pte, found nothing"),
        (text, r"text\.pte: expected an ExecuTorch program \(\.pte\), got a file of 13 bytes"),
        (noise, r"noise\.pte: expected an ExecuTorch program, got one that cannot be read"),
        (tmp_path, r"expected a bundle with a manifest\.json, found none"),
    ):
        with pytest.raises(CarpoolError, match=message):
            run_doctor(path)
    with pytest.raises(ConfigError, match=r"--batch and --length resize a bundle's golden step"):
        run_doctor(text, "--batch", 2)
    with pytest.raises(ConfigError, match=r"^--batch: expected 1 to 4, .*, got 5\.$"):
        run_doctor(tiny_bundle, "--batch", 5)
    with pytest.raises(ConfigError, match=r"^--length: expected 2 to 12, .*, got 1\.$"):
        run_doctor(tiny_bundle, "--length", 1)
