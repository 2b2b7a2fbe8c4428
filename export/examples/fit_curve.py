"""A training program that has nothing to do with retrieval: a small network learns a curve.

    python export/examples/fit_curve.py

``lower_gradient_program`` compiles any function of tensors that calls ``torch.autograd.grad``;
the plain ExecuTorch runtime then trains with it. Prints how far the program's gradient is from
eager PyTorch's, and the loss before and after training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import Dim

from carpool_export.lowering import lower_gradient_program

HIDDEN = 32
NUM_VALUES = 3 * HIDDEN + 1


def step(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of ``w2 tanh(w1 x + b1) + b2``, and its gradient by all of theta.

    Args:
        theta: float32, shape ``(NUM_VALUES,)``.
        x: float32, shape ``(points, 1)``.
        y: float32, shape ``(points, 1)``.
    """
    theta = theta.detach().requires_grad_()
    first, bias, second, last = theta.split([HIDDEN, HIDDEN, HIDDEN, 1])
    inside = torch.tanh(x * first + bias)
    errors = inside.mm(second.view(HIDDEN, 1)) + last - y
    loss = (errors * errors).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return loss.detach().view(1), gradient


def main() -> None:
    """Compiles, compares, trains."""
    points = {0: Dim("points", min=1, max=256)}
    program = lower_gradient_program(
        step,
        (torch.zeros(NUM_VALUES), torch.zeros(200, 1), torch.ones(200, 1)),
        (None, points, points),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.pte"
        path.write_bytes(program)
        loaded = Runtime.get().load_program(path)
        method = loaded.load_method("forward")

        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(NUM_VALUES, generator=generator)
        x = torch.linspace(-3, 3, 64).view(64, 1)
        y = torch.sin(2 * x)
        loss, gradient = (output.clone() for output in method.execute([theta, x, y]))
        _, eager = step(theta.double(), x.double(), y.double())
        error = float((gradient - eager).abs().max() / eager.abs().max())
        before = float(loss)
        for _ in range(2000):
            loss, gradient = method.execute([theta, x, y])
            theta = theta - 0.05 * gradient
        print(f"gradient error {error:.1e}, loss {before:.3f} -> {float(loss):.3f}")


if __name__ == "__main__":
    main()
