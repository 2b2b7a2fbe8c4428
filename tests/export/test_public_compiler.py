"""``lower_gradient_program`` on functions that are no retriever."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from carpool.bundle.manifest import Method, TensorSpec
from carpool.errors import ExportError
from carpool_export.lowering import lower_gradient_program
from carpool_export.parity import relative_error
from carpool_export.runner import LoadedProgram

FROZEN = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)
).requires_grad_(requires_grad=False)
for place, parameter in enumerate(FROZEN.parameters()):
    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))


def penalty_gradient(theta: Tensor, x: Tensor) -> Tensor:
    """Of a frozen network's output, by a shift of its input."""
    shift = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(FROZEN(x + shift).square().sum(), shift)
    return gradient


def test_program_through_a_frozen_network_equals_eager(tmp_path: Path) -> None:
    """Frozen weights inside, a size known at run time, any number of calls."""
    path = tmp_path / "shift.pte"
    path.write_bytes(
        lower_gradient_program(
            penalty_gradient,
            (torch.ones(4), torch.ones(7, 4)),
            (None, {0: Dim("rows", min=1, max=9)}),
            method="shift",
        )
    )
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=(1,)) for name in ("theta", "x"))
    program = LoadedProgram(path, {"shift": Method(bounds={}, inputs=specs, outputs=())})
    generator = torch.Generator().manual_seed(2)
    for rows in (1, 9, 3, 9):
        theta, x = torch.randn(4, generator=generator), torch.randn(rows, 4, generator=generator)
        (found,) = program.call("shift", {"theta": theta, "x": x})
        exact = FROZEN.double()
        expected = penalty_gradient(theta.double(), x.double())
        exact.float()
        assert relative_error(found, expected) <= 2e-6


WIDE = torch.rand(48, 2048, generator=torch.Generator().manual_seed(6))


def wide_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """A long sum of positive numbers, and back through it."""
    x = x.detach().requires_grad_()
    y = torch.nn.functional.linear(x, WIDE.to(x.dtype))
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def test_short_sums_round_less_and_cost_no_bytes(tmp_path: Path) -> None:
    """Against float64, at other sizes than the example's; the matrix is stored once."""
    programs = {}
    for longest_sum in (None, 64):
        path = tmp_path / f"{longest_sum}.pte"
        shapes = ({0: Dim("rows", min=1, max=32)},)
        path.write_bytes(
            lower_gradient_program(
                wide_gradient, (torch.ones(7, 2048),), shapes, longest_sum=longest_sum
            )
        )
        specs = (TensorSpec(name="x", dtype="float32", shape=(1,)),)
        methods = {"forward": Method(bounds={}, inputs=specs, outputs=())}
        programs[longest_sum] = LoadedProgram(path, methods)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) - min(sizes) < 10_000 < 4 * WIDE.numel()
    generator = torch.Generator().manual_seed(7)
    for rows in (1, 32, 5):
        x = torch.rand(rows, 2048, generator=generator)
        exact = wide_gradient(x.double())
        plain, short = (
            [
                relative_error(found, expected)
                for found, expected in zip(program.call("forward", {"x": x}), exact, strict=True)
            ]
            for program in programs.values()
        )
        assert short[0] < plain[0] / 2
        assert max(short) <= 2e-6


def test_what_cannot_be_lowered_and_shapes_that_do_not_fit_are_said() -> None:
    """The reason in one line; one shape per input."""
    with pytest.raises(ExportError, match=r"^the program could not be lowered: "):
        lower_gradient_program(lambda x: x if x.sum() > 0 else -x, (torch.ones(3),))
    with pytest.raises(ValueError, match=r"^expected dynamic shapes of 2 inputs, got 1\.$"):
        lower_gradient_program(torch.add, (torch.ones(3), torch.ones(3)), (None,))


@pytest.mark.slow
def test_the_example_learns_its_curve() -> None:
    """As a reader runs it."""
    example = Path(__file__).parents[2] / "export" / "examples" / "fit_curve.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    found = re.fullmatch(r"gradient error (\S+), loss (\S+) -> (\S+)\n", done.stdout)
    assert found is not None
    error, before, after = map(float, found.groups())
    assert error <= 2e-6
    assert after < 0.05 < before
